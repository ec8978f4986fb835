"""A penalty that draws every weight vector to a length of 1.

Source: Georgiou et al. 2021 (Norm Loss, arXiv:2103.06583), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ext.functional._unit_norms import unit_norms
from lightning_ext.functional._unitwise_clip import Norms


def norm_loss(params: Sequence[Tensor], strength: float, *, norms: Norms = unit_norms) -> Tensor:
    r"""Return how far the units of weights are from norm 1.

    .. math:: \lambda \sum_c (1 - \|w_c\|)^2

    Args:
        params: weights, whose units c are those of ``unit_norms``: rows, filters, whole vectors.
        strength: λ, at least 0.
        norms: as in ``unitwise_clip``.

    Returns:
        Of no dimension; 0 of no weights.

    Raises:
        ValueError: if ``strength`` is negative.

    Example:
        >>> norm_loss([torch.tensor([[3.0, 4.0], [0.0, 1.0]])], 0.5)
        tensor(8.)
    """
    _check(strength)
    found = norms(params)
    if not found:
        return torch.zeros(())
    return _penalty(torch.cat([x.flatten() for x in found]), strength).sum()


@torch.no_grad()
def norm_loss_grad_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    strength: float,
    *,
    norms: Norms = unit_norms,
) -> list[Tensor]:
    r"""Add the gradient of ``norm_loss`` to gradients, in place.

    .. math:: g_c \leftarrow g_c + 2 \lambda \left(1 - \frac{1}{\|w_c\|}\right) w_c

    Nothing is added where all of :math:`w_c` is 0.

    Args:
        params: weights.
        grads: of each the gradient, of its shape.
        strength: λ, at least 0.
        norms: as in ``unitwise_clip``; called once, with the weights.

    Returns:
        Of each parameter the penalties of its units, λ(1 − ‖w_c‖)², in the shape of their norms.

    Raises:
        ValueError: if ``strength`` is negative, or there are not as many gradients as weights.

    Example:
        >>> weight, grad = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2)
        >>> norm_loss_grad_([weight], [grad], 0.5)[0].tolist(), grad.tolist()
        ([[8.0], [0.0]], [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]])
    """
    _check(strength)
    if len(params) != len(grads):
        raise ValueError(
            f"there are {len(params)} params and {len(grads)} grads; give one for each"
        )
    found = norms(params)
    if not found:
        return []
    length = torch.cat([x.flatten() for x in found])
    slope = 2 * strength * (1 - torch.where(length > 0, length, 1).reciprocal())
    sizes = [x.numel() for x in found]
    for part, norm, param, grad in zip(slope.split(sizes), found, params, grads, strict=True):
        grad.add_(part.view(norm.shape).to(norm.dtype) * param)
    penalties = _penalty(length, strength).split(sizes)
    return [part.view(x.shape).to(x.dtype) for part, x in zip(penalties, found, strict=True)]


def _penalty(length: Tensor, strength: float) -> Tensor:
    return strength * (1 - length).square()


def _check(strength: float) -> None:
    if not strength >= 0:
        raise ValueError(f"strength={strength} is not allowed; it must be at least 0")
