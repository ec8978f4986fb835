"""Blocks of a softmax contrastive loss: what one device, or one rank of a ring, adds to the whole.

Source: Cheng et al. 2024 (Inf-CL, arXiv:2410.17243): log-sum-exp by tiles and around a ring, of
    which the backward pass computes the tiles again.
Differs: rows and columns in one pass; log-sum-exps are float64, so that a small loss is not lost in
    the difference of large logits; sums are taken off a maximum at any scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ext.functional._contrastive._inputs import (
    as_index,
    as_labels,
    as_scalar,
    check_excluded,
    check_pair,
    check_vectors,
)
from lightning_ext.functional._contrastive._ops import LogSumExp, logsumexp_grads


class BlockLogSumExp(NamedTuple):
    """What ``block_logsumexp`` returns."""

    rows: Tensor
    columns: Tensor
    positives: Tensor


def block_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    own: Tensor | None = None,
    columns: bool = True,
) -> BlockLogSumExp:
    """Return the log-sum-exp of every row and column of z, and the logits of the positives:

        z_ij = s x_i·y_j
        r_i = log Σ_j exp z_ij,    c_j = log Σ_i exp z_ij,    p_i = z_i,label(i)

    The sums leave out the pairs that are excluded; p does not. Where y is one of several blocks of
    columns, ``merge_logsumexp`` puts the r of the blocks together and p adds up.

    Args:
        x: shape (m, d), floating point.
        y: shape (n, d), same dtype.
        scale: s, a number or a tensor of shape ().
        labels: integers, shape (m,): the column of each row's positive in this block; anything out
            of [0, n) for a row that has none here. By default i for row i.
        excluded: boolean, broadcastable to (m, n), True where a pair is left out of the sums.
        own: integers, shape (m,): a column to leave out in each row, such as the row itself; out of
            [0, n) for none.
        columns: whether c is wanted.

    Returns:
        ``rows`` r of shape (m,), ``columns`` c of shape (n,) or (0,), ``positives`` p of shape
        (m,), 0 for rows without one: all float64. ``-inf`` is the sum of nothing.

    Raises:
        TypeError: if x and y are not of one floating-point dtype and device, indices are no
            integers, or ``excluded`` is not boolean.
        ValueError: if shapes do not fit.
    """  # noqa: D415
    inputs = _checked(x, y, scale, labels, excluded, own)
    return BlockLogSumExp(*LogSumExp.apply(*inputs, columns))


def mirrored_logsumexp(x: Tensor, scale: Tensor | float, labels: Tensor) -> BlockLogSumExp:
    """Return the same for s x_i·x_j without the diagonal, where label(label(i)) is i."""
    own = torch.arange(len(x), device=x.device)
    x, _, *inputs = _checked(x, x, scale, labels, None, own)
    return BlockLogSumExp(*LogSumExp.apply(x, None, *inputs, False))


def merge_logsumexp(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp a + exp b), the log-sum-exp of two blocks together; ``-inf`` is an empty one.

    Args:
        a: any shape, floating point.
        b: broadcastable to it.

    Returns:
        The shape of both together.

    Example:
        >>> merge_logsumexp(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, -torch.inf]))
        tensor([0.6931,   -inf])
    """
    return torch.logaddexp(a, b)


def block_logsumexp_grads(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    rows: Tensor,
    columns: Tensor | None,
    grad_rows: Tensor,
    grad_columns: Tensor | None,
    grad_positives: Tensor,
    *,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one block adds to the gradients, given the log-sum-exp over all blocks:

        G_ij = ∂r_i·exp(z_ij − r_i) + ∂c_j·exp(z_ij − c_j) + ∂p_i·[j = label(i)]
        dx = s G y,    dy = s Gᵀ x,    ds = Σ_ij G_ij x_i·y_j

    With r and c of this block alone it is the backward pass of ``block_logsumexp``. Not itself
    differentiable.

    Args:
        x: as given to ``block_logsumexp``, like y, scale, labels, excluded and own.
        y: see x.
        scale: see x.
        rows: r over all blocks, shape (m,).
        columns: c over all blocks, shape (n,), or None where only rows count.
        grad_rows: ∂r, gradient of the loss with respect to r, shape (m,).
        grad_columns: ∂c, shape (n,), or None.
        grad_positives: ∂p, shape (m,).
        labels: see x.
        excluded: see x.
        own: see x.

    Returns:
        dx and dy, of x's and y's shapes, at least float32 so that blocks add up; ds, shape (),
        float64.

    Raises:
        TypeError: as ``block_logsumexp``.
        ValueError: as ``block_logsumexp``, or if a vector's length does not fit.
    """  # noqa: D415
    inputs = _checked(x, y, scale, labels, excluded, own)
    vectors = (rows, columns, grad_rows, grad_columns, grad_positives)
    check_vectors(x, y, *vectors)
    return logsumexp_grads(*inputs, *vectors)


def _checked(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    labels: Tensor | None,
    excluded: Tensor | None,
    own: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    check_pair(x, y, ("x", "y"))
    check_excluded(excluded, x, y)
    own = None if own is None else as_index(own, "own", x)
    return x, y, as_scalar(scale, "scale", x), as_labels(labels, x), excluded, own
