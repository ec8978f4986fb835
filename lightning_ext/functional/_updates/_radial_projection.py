"""The part of a step that only stretches the weights, and AdamP, which takes it out.

Source: Heo et al. 2021 (AdamP, arXiv:2006.08217), Algorithm 2 and section 3.2.
Differs: a cosine with a norm of 0 in it is 0, and there is no ε in it, so that the scale of weights
    and gradients makes no difference; ŵ = w/‖w‖ has none either. The authors' code divides by
    max(‖g‖, ε) max(‖w‖, ε) (torch's cosine_similarity): where a norm is below ε, its cosine is
    smaller than ours, and it projects where we may not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ext.functional._updates._adam_directions import adam_direction, wide_dtype

Reduce = Callable[[Tensor], Tensor]


def radial_part(
    param: Tensor,
    grad: Tensor,
    update: Tensor,
    *,
    delta: float = 0.1,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what to take out of an update p of weights w that the loss is blind to the size of.

        c_r = p_r·w_r/‖w_r‖²  of each row r,  if max_r |cos(g_r, w_r)| < δ/√(entries of a row)
        c = p·w/‖w‖²          of the whole,   otherwise, if |cos(g, w)| < δ/√(entries)
        c = 0                 else, and for tensors of fewer than two dimensions

    The gradient of such weights, in front of a norm layer, is orthogonal to them.

    Args:
        param: w, real, any shape; rows are those of dimension 0 (output channels).
        grad: g, of the same shape.
        update: p, of the same shape, any multiple of what will be subtracted.
        delta: δ.
        reduce: where the tensors are shards of one parameter along dimension 0, adds up a tensor
            over all of them.

    Returns:
        c, shape (rows, 1, …) with as many dimensions as w, and whether it is one of the first two,
        a boolean tensor of no dimension.

    Example:
        >>> w, p = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])
        >>> share, _ = radial_part(w, torch.tensor([[-4.0, 3.0]]), p)
        >>> p - share * w  # which g is orthogonal to, so no longer along w
        tensor([[ 3.2000, -2.4000]])
    """
    if param.dim() < 2:
        share = torch.zeros((1,) * param.dim(), dtype=wide_dtype(param), device=param.device)
        return share, torch.zeros((), dtype=torch.bool, device=param.device)
    rows = row_sums(param, grad, update)
    total = tensor_sums(rows, math.prod(param.shape[1:]), delta)
    total = total if reduce is None else reduce(total)
    share, projected = row_shares(rows, total, delta)
    return share.view(len(share), *[1] * (param.dim() - 1)), projected


def adamp_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | float,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    maximize: bool = False,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one parameter w and its moments after a step of AdamP.

        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  p = m̂/(√v̂ + ε)
        w ← (1 − lr·λ·ρ)w − lr·(p − c·w),  c of ``radial_part``;  ρ = 1 where c is 0 by rule

    Args:
        param: w, a real tensor of any shape.
        grad: g, of the same shape.
        exp_avg: m before the step, zeros at first.
        exp_avg_sq: v before the step, zeros at first.
        step: t, steps taken when this one is done; 1 at the first.
        lr: rate, a number or a tensor of no dimension.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        delta: δ of ``radial_part``.
        wd_ratio: ρ where the update is projected.
        nesterov: take β₁m + (1 − β₁)g for m in p.
        maximize: take −g for g.
        reduce: as in ``radial_part``.

    Returns:
        w, m and v after the step, in their dtypes.

    Example:
        >>> w, zero = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
        >>> w, _, _ = adamp_update(w, torch.tensor([[-4.0, 3.0]]), zero, zero, 1, lr=0.1)
        >>> w  # along g, not along the signs of g
        tensor([[3.1120, 3.9160]])
    """
    dtype = wide_dtype(param, grad, exp_avg, exp_avg_sq)
    signed, wide = (-grad if maximize else grad).to(dtype), param.to(dtype)
    mean, square, direction = adam_direction(
        signed, exp_avg, exp_avg_sq, step, betas=betas, eps=eps, nesterov=nesterov
    )
    share, projected = radial_part(wide, signed, direction, delta=delta, reduce=reduce)
    ratio = 1 - (1 - wd_ratio) * projected.to(dtype)
    moved = wide * (1 - lr * weight_decay * ratio) - lr * (direction - share * wide)
    return moved.to(param.dtype), mean, square


def row_sums(param: Tensor, grad: Tensor, update: Tensor) -> Tensor:
    """Return g·w, g·g, w·w and p·w of each row, shape (4, rows), at least in float32."""
    dtype = wide_dtype(param, grad, update)
    w, g, p = (x.to(dtype).flatten(1) for x in (param, grad, update))
    return torch.stack([torch.linalg.vecdot(x, y) for x, y in ((g, w), (g, g), (w, w), (p, w))])


def tensor_sums(rows: Tensor, width: int, delta: float) -> Tensor:
    """Return the sums of a tensor: those of its rows, how many are not orthogonal, its entries.

    Args:
        rows: what ``row_sums`` returns.
        width: entries of a row.
        delta: δ.
    """
    dot, grad, weight, _ = rows
    counted = (_along(dot, grad, weight, delta**2 / max(width, 1))).sum(dtype=rows.dtype)
    entries = rows.new_tensor(rows.shape[1] * width)
    return torch.cat([rows.sum(1), torch.stack([counted, entries])])


def row_shares(rows: Tensor, total: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Return c of each row and whether anything is projected.

    Args:
        rows: what ``row_sums`` returns.
        total: what ``tensor_sums`` returns, of all shards.
        delta: δ.
    """
    dot, grad, weight, update, counted, entries = total
    by_row = (counted == 0) & (entries > 0)
    as_whole = (entries > 0) & ~_along(dot, grad, weight, delta**2 / entries.clamp_min(1))
    shares = torch.where(by_row, _over(rows[3], rows[2]), _over(update, weight))
    return torch.where(by_row | as_whole, shares, 0.0), by_row | as_whole


def _along(dot: Tensor, grad: Tensor, weight: Tensor, bound: Tensor | float) -> Tensor:
    """Whether cos² ≥ bound; not where a norm is 0."""
    scale = grad.sqrt() * weight.sqrt()  # the product of squares might underflow
    return (dot.abs() >= bound**0.5 * scale) & (scale > 0)


def _over(x: Tensor, square: Tensor) -> Tensor:
    return torch.where(square > 0, x / torch.where(square > 0, square, 1.0), 0.0)
