"""CAME: second moments and residuals of a matrix kept as means of its rows and columns.

Source: Luo et al. 2023 (CAME, arXiv:2307.02047), Algorithm 2; the form for vectors from the
    authors' code, as the paper has none.
Differs: a tensor of more than two dimensions is the matrix (dimension 0, rest), where the authors'
    code factors the last two dimensions and so keeps of a convolution nearly as much as Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ext.functional._updates._adam_directions import wide_dtype

Reduce = Callable[[Tensor], Tensor]


class FactoredState(NamedTuple):
    """What CAME keeps of a matrix beside its momentum, all zeros at first.

    Attributes:
        sq_row: mean of g² of each row, shape (rows,).
        sq_col: of each column, shape (columns,).
        res_row: mean of the squared distance of update and momentum of each row, shape (rows,).
        res_col: of each column, shape (columns,).
    """

    sq_row: Tensor
    sq_col: Tensor
    res_row: Tensor
    res_col: Tensor


def came_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    state: FactoredState,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, FactoredState]:
    """Return one matrix θ, its momentum and its factors after a step of CAME.

        r, c ← β₂·(r, c) + (1 − β₂)·(row means, column means of g² + ε₁),  V = r cᵀ/mean(r)
        û = g/√V,  û ← û/max(1, RMS(û)/d),  m ← β₁m + (1 − β₁)û
        R, C ← β₃·(R, C) + (1 − β₃)·(row means, column means of (û − m)² + ε₂),  S = R Cᵀ/mean(R)
        θ ← (1 − lr·λ)θ − lr·m/√S

    Args:
        param: θ, real, of two dimensions or more; rows are those of dimension 0.
        grad: g, of the same shape.
        exp_avg: m before the step, of the same shape, zeros at first.
        state: r, c, R and C before the step, zeros at first.
        lr: rate, a number or a tensor of no dimension.
        betas: β₁, β₂ and β₃, each in [0, 1).
        eps: ε₁ and ε₂.
        clip_threshold: d.
        weight_decay: λ.
        maximize: take −g for g.
        reduce: where the tensors are shards of one parameter along dimension 0, adds up a vector
            over all of them; called three times.

    Returns:
        θ, m and the factors after the step, in their dtypes.

    Raises:
        ValueError: if the parameter has fewer than two dimensions; ``came_vector_update`` is for
            those.

    Example:
        >>> w, g = torch.ones(2, 2), torch.tensor([[1.0, -2.0], [3.0, 6.0]])
        >>> zeros = FactoredState(*torch.zeros(4, 2))
        >>> w, m, _ = came_update(w, g, torch.zeros(2, 2), zeros, lr=0.1, betas=(0.5, 0.9, 0.9))
        >>> m.sign()
        tensor([[ 1., -1.],
                [ 1.,  1.]])
    """
    if param.dim() < 2:
        raise ValueError(
            f"param has shape {tuple(param.shape)}; what has no matrix goes to came_vector_update"
        )
    dtype = wide_dtype(param, grad, exp_avg)
    matrix = (-grad if maximize else grad).to(dtype).flatten(1)
    before = [x.to(dtype) for x in state]
    squares = matrix.square() + eps[0]
    sq_row, sq_col, factors = _moved(squares, before[0], before[1], betas[1], reduce)
    update = matrix * factors[0][:, None] * factors[1]
    update = update * clip_factor(total_square(update, reduce), clip_threshold)
    mean = exp_avg.to(dtype).reshape(matrix.shape).lerp(update, 1 - betas[0]).to(exp_avg.dtype)
    wide = mean.to(dtype)
    residual = (update - wide).square() + eps[1]
    res_row, res_col, factors = _moved(residual, before[2], before[3], betas[2], reduce)
    step = (wide * factors[0][:, None] * factors[1]).view(param.shape)
    moved = param.to(dtype) * (1 - lr * weight_decay) - lr * step
    after = (sq_row, sq_col, res_row, res_col)
    kept = FactoredState(*(x.to(old.dtype) for x, old in zip(after, state, strict=True)))
    return moved.to(param.dtype), mean.view(param.shape), kept


def came_vector_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one parameter θ that is no matrix, and its moments, after a step of CAME.

        v ← β₂v + (1 − β₂)(g² + ε₁),  û = g/√v,  û ← û/max(1, RMS(û)/d)
        m ← β₁m + (1 − β₁)û,  θ ← (1 − lr·λ)θ − lr·m

    Args:
        param: θ, a real tensor of any shape.
        grad: g, of the same shape.
        exp_avg: m before the step, of the same shape, zeros at first.
        exp_avg_sq: v before the step, of the same shape, zeros at first.
        lr: rate, a number or a tensor of no dimension.
        betas: β₁, β₂ and one that is not used here.
        eps: ε₁ and one that is not used here.
        clip_threshold: d.
        weight_decay: λ.
        maximize: take −g for g.
        reduce: where the tensors are shards of one parameter, adds up a vector over all of them.

    Returns:
        θ, m and v after the step, in their dtypes.

    Example:
        >>> w, g, zero = torch.zeros(2), torch.tensor([3.0, -5.0]), torch.zeros(2)
        >>> came_vector_update(w, g, zero, zero, lr=1.0, betas=(0.5, 0.75, 0.9))[0]
        tensor([-0.5000,  0.5000])
    """
    dtype = wide_dtype(param, grad, exp_avg, exp_avg_sq)
    signed = (-grad if maximize else grad).to(dtype)
    square = exp_avg_sq.to(dtype) * betas[1] + (signed.square() + eps[0]) * (1 - betas[1])
    square = square.to(exp_avg_sq.dtype)
    kept = square.to(dtype)
    # In few bits a small second moment may have become 0.
    update = torch.where(kept > 0, signed * torch.where(kept > 0, kept, 1.0).rsqrt(), 0.0)
    update = update * clip_factor(total_square(update, reduce), clip_threshold)
    mean = exp_avg.to(dtype).lerp(update, 1 - betas[0])
    moved = param.to(dtype) * (1 - lr * weight_decay) - lr * mean
    return moved.to(param.dtype), mean.to(exp_avg.dtype), square


def row_factor(row: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return 1/√(r/mean(r)), the mean being a total over a count, at least one."""
    return (row * (count.clamp_min(1) / total)).rsqrt()


def clip_factor(sums: Tensor, threshold: float) -> Tensor:
    """Return 1/max(1, RMS/d) of a sum of squares and a count along the last dimension."""
    rms = (sums[..., 0] / sums[..., 1].clamp_min(1)).sqrt()
    return 1 / (rms / threshold).clamp_min(1.0)


def total_square(update: Tensor, reduce: Reduce | None) -> Tensor:
    """Return the sum of squares and the number of entries."""
    sums = torch.stack([update.square().sum(), update.new_tensor(update.numel())])
    return sums if reduce is None else reduce(sums)


def _moved(
    squares: Tensor, row: Tensor, col: Tensor, beta: float, reduce: Reduce | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Row and column means after a step, and what they make of 1/√(r cᵀ/mean(r))."""
    row = row * beta + squares.sum(1) * ((1 - beta) / max(squares.shape[1], 1))
    sums = torch.cat([squares.sum(0), row.sum()[None], row.new_tensor([len(row)])])
    sums = sums if reduce is None else reduce(sums)
    total, count = sums[-2:]
    col = col * beta + sums[:-2] * ((1 - beta) / count.clamp_min(1))
    return row, col, (row_factor(row, total, count), col.rsqrt())
