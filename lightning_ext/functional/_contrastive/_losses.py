"""Contrastive losses over all pairs of a batch, whose matrix of logits is never stored.

Source: Radford et al. 2021 (CLIP, arXiv:2103.00020); van den Oord et al. 2018 (InfoNCE,
    arXiv:1807.03748); Chen et al. 2020 (SimCLR, arXiv:2002.05709, eq. 1); Zhai et al. 2023 (SigLIP,
    arXiv:2303.15343, eq. 1); Cheng et al. 2024 (Inf-CL, arXiv:2410.17243) for the tiles.
Differs: see ``block_logsumexp``, which does the work.
"""

from __future__ import annotations

from torch import Tensor

from lightning_ext.functional._contrastive._blocks import block_logsumexp, mirrored_logsumexp
from lightning_ext.functional._contrastive._formulas import (
    Reduction,
    clip_by,
    info_nce_by,
    nt_xent_by,
    reduced,
)
from lightning_ext.functional._contrastive._inputs import check_reduction
from lightning_ext.functional._contrastive._siglip import siglip_rows


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, *, reduction: Reduction = "mean"
) -> Tensor:
    """Return the symmetric cross-entropy of matching images and texts, as in CLIP:

        z_ij = s x_i·y_j
        ℓ_i = ½(log Σ_j exp z_ij − z_ii) + ½(log Σ_j exp z_ji − z_ii)

    Both directions come out of one pass over tiles of z. Inputs are taken as they are: normalise
    them first if z is to be a cosine. Sums are in ``torch.promote_types(dtype, torch.float32)``.
    Gradients for image, text and scale, by a backward pass that computes the tiles again; it cannot
    be differentiated a second time. Works under ``torch.compile`` and ``torch.func.grad``.

    Args:
        image: x, shape (b, d), floating point.
        text: y, of the same shape and dtype; row i belongs to row i of ``image``.
        scale: s itself, not its logarithm; a number or a tensor of shape ().
        reduction: mean over the b pairs, their sum, or all of them.

    Returns:
        Shape (), or (b,) for ``"none"``; at least float32.

    Raises:
        TypeError: if the inputs are not of one floating-point dtype and device.
        ValueError: if shapes do not fit, or ``reduction`` is unknown.

    Example:
        >>> clip_loss(torch.eye(2), torch.eye(2), 3.0)  # log(1 + e⁻³)
        tensor(0.0486)
    """  # noqa: D415
    return clip_by(block_logsumexp, image, text, scale, reduction)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the cross-entropy of finding each query's key among all keys:

        z_ij = s q_i·k_j
        ℓ_i = log Σ_{j not excluded} exp z_ij − z_i,label(i)

    A pair that is excluded is missing in the sum only: with the queries' own keys excluded this is
    the decoupled loss of Yeh et al. 2022 (arXiv:2110.06848). Precision, gradients (query, key,
    scale) and what composes: as in ``clip_loss``.

    Args:
        query: q, shape (m, d), floating point, not normalised here.
        key: k, shape (n, d), same dtype; n may differ from m (hard negatives, a queue).
        scale: s itself, not its logarithm; a number or a tensor of shape ().
        labels: integers in [0, n), shape (m,): each query's key. By default query i has key i, for
            which n ≥ m is needed. The loss of a label out of range is nan.
        excluded: boolean, broadcastable to (m, n), True where a pair is left out of the sum.
        reduction: mean over the m queries, their sum, or all of them.

    Returns:
        Shape (), or (m,) for ``"none"``; at least float32. ``-inf`` where all keys are excluded.

    Raises:
        TypeError: if the inputs are not of one floating-point dtype and device, ``labels`` are no
            integers, or ``excluded`` is not boolean.
        ValueError: if shapes do not fit, or ``reduction`` is unknown.

    Example:
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> info_nce_loss(key[:1], key, 2.0, excluded=torch.tensor([False, False, True]))
        tensor(0.1269)
    """  # noqa: D415
    return info_nce_by(block_logsumexp, query, key, scale, labels, excluded, reduction)


def nt_xent_loss(
    a: Tensor, b: Tensor, scale: Tensor | float, *, reduction: Reduction = "mean"
) -> Tensor:
    """Return SimCLR's loss (NT-Xent) of two views of each sample, u = [a; b], 2n rows:

        z_ij = s u_i·u_j
        ℓ_i = log Σ_{j≠i} exp z_ij − z_i,pair(i),    pair(i) = i ± n

    The paper divides by a temperature τ: s = 1/τ, and normalises the views, which is not done here.
    Of each pair of tiles that mirror each other only one is computed. Precision, gradients (a, b,
    scale) and what composes: as in ``clip_loss``.

    Args:
        a: the first views, shape (n, d), floating point.
        b: the second views, same shape and dtype.
        scale: s itself, not its logarithm; a number or a tensor of shape ().
        reduction: mean over the 2n views, their sum, or all of them.

    Returns:
        Shape (), or (2n,) for ``"none"``, those of a first; at least float32.

    Raises:
        TypeError: if the inputs are not of one floating-point dtype and device.
        ValueError: if shapes do not fit, or ``reduction`` is unknown.

    Example:
        >>> nt_xent_loss(torch.eye(2), torch.eye(2), 1.0)  # log(e + 2) − 1
        tensor(0.5514)
    """  # noqa: D415
    return nt_xent_by(mirrored_logsumexp, a, b, scale, reduction)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the loss of telling for each pair whether it matches, as in SigLIP:

        z_ij = s x_i·y_j + b
        ℓ_i = −Σ_j log σ(±z_ij),    + where text j belongs to image i, else −

    SigLIP starts at s = 10, b = −10. Precision, gradients (image, text, scale, bias) and what
    composes: as in ``clip_loss``.

    Args:
        image: x, shape (m, d), floating point, not normalised here.
        text: y, shape (n, d), same dtype.
        scale: s itself, not its logarithm; a number or a tensor of shape ().
        bias: b, a number or a tensor of shape ().
        labels: integers, shape (m,): each image's text, out of [0, n) for none. By default image i
            has text i. Sums over blocks of texts, with their labels, add up to the whole.
        reduction: mean over the m images of their sums over texts, the sum, or all of them.

    Returns:
        Shape (), or (m,) for ``"none"``; at least float32.

    Raises:
        TypeError: if the inputs are not of one floating-point dtype and device, or ``labels`` are
            no integers.
        ValueError: if shapes do not fit, or ``reduction`` is unknown.

    Example:
        >>> siglip_loss(torch.eye(2), torch.eye(2), 4.0, -2.0)  # 2 log(1 + e⁻²)
        tensor(0.2539)
    """  # noqa: D415
    check_reduction(reduction)
    return reduced(siglip_rows(image, text, scale, bias, labels=labels), image, reduction)
