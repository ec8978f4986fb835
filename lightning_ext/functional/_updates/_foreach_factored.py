"""CAME in place, over lists of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Unpack

import torch
from torch import Tensor

from lightning_ext.functional._updates._adam_directions import (
    STREAMS,
    States,
    carved,
    decoded,
    foreach_sq_norms,
    kept,
    wide_dtype,
)
from lightning_ext.functional._updates._checks import Options, UpdateOptions, check_lists
from lightning_ext.functional._updates._entries import check_columns, check_overlaps
from lightning_ext.functional._updates._factored import (
    FactoredState,
    Reduce,
    clip_factor,
    row_factor,
)
from lightning_ext.functional._updates._lists import update_by_spans
from lightning_ext.functional._updates._settings import check_came

Factors = list[tuple[Tensor, Tensor]]
Bits = tuple[Sequence[Tensor] | None, int, int]  # steps, seed and stream


@torch.no_grad()
def came_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: States,
    states: Sequence[FactoredState],
    steps: Sequence[Tensor] | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    reduce: Reduce | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``came_update`` for every matrix, in place; the gradients stay.

    Args:
        params: θ of each matrix. In these three lists the i-th ones have one shape and device;
            dtypes may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``QuantizedState``.
        states: r, c, R and C of each.
        steps: of each, a float32 tensor of one entry, already counting this step; needed where
            something is rounded at random.
        lr: rate, as in ``adamw_update_``.
        betas: β₁, β₂ and β₃, each in [0, 1).
        eps: ε₁ and ε₂.
        clip_threshold: d.
        weight_decay: λ.
        maximize: take −g for g.
        reduce: where the tensors are shards along dimension 0: given a vector of sums of all
            matrices, returns their sums over the shards; called three times.
        options: as in ``adamw_update_``.

    Returns:
        What each û was multiplied by to have an RMS of at most d, shape (matrices,); 1 where the
        step is left out.

    Raises:
        ValueError: if the lists do not fit together, or a parameter has fewer than two dimensions.
        TypeError: for dtypes that have no update.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs}
    check_came(betas, eps)
    lr, chosen, _ = check_lists("came_update_", lists, steps, Options(**options), lr)
    check_factors(params, states)

    def update(part: slice, weights: list[Tensor], found: list[Tensor], scratch: Tensor) -> Tensor:
        means, factored = [decoded(x) for x in exp_avgs[part]], states[part]
        dtype = wide_dtype(*weights, *found, *means)
        updates = carved(weights, scratch if scratch.dtype == dtype else None, dtype)
        flat = [u.flatten(1) for u in updates]
        matrices = [x.to(dtype).flatten(1) for x in found]
        if maximize:
            matrices = list(torch._foreach_neg(matrices))
        factors = _factors(matrices, [x[:2] for x in factored], betas[1], eps[0], reduce, flat)
        _scaled(matrices, factors, flat)
        clip = _clip_(updates, clip_threshold, reduce)
        counts = None if steps is None else steps[part]
        bits = counts, chosen.seed, chosen.stream + 1 + STREAMS * (part.start or 0)
        means = _momenta_(exp_avgs[part], means, updates, betas[0], bits)
        torch._foreach_sub_(updates, means)
        factors = _factors(flat, [x[2:] for x in factored], betas[2], eps[1], reduce, flat)
        _scaled([m.flatten(1) for m in means], factors, flat)
        _move_(weights, updates, lr, weight_decay)
        return clip

    written, whole = (exp_avgs, states), reduce is not None
    return update_by_spans(update, params, grads, written, steps, chosen, whole=whole, left_out=1.0)


@torch.no_grad()
def came_vector_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Sequence[Tensor] | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    reduce: Reduce | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``came_vector_update`` for every parameter, in place; the gradients stay.

    Args:
        params: θ of each parameter. In all lists the i-th ones have one shape and device; dtypes
            may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``QuantizedState``.
        exp_avg_sqs: v of each, as m.
        steps: of each, a float32 tensor of one entry, already counting this step; needed where
            something is rounded at random.
        lr: rate, as in ``adamw_update_``.
        betas: β₁, β₂ and β₃, each in [0, 1).
        eps: ε₁ and ε₂.
        clip_threshold: d.
        weight_decay: λ.
        maximize: take −g for g.
        reduce: where the tensors are shards: given a vector of sums of all parameters, returns
            their sums over the shards.
        options: as in ``adamw_update_``.

    Returns:
        What each û was multiplied by to have an RMS of at most d, shape (parameters,); 1 where the
        step is left out.

    Raises:
        ValueError: if the lists do not fit together, or a setting is out of range.
        TypeError: for dtypes that have no update.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_came(betas, eps)
    lr, chosen, _ = check_lists("came_vector_update_", lists, steps, Options(**options), lr)

    def update(part: slice, weights: list[Tensor], found: list[Tensor], _: Tensor) -> Tensor:
        means, squares = ([decoded(x) for x in state[part]] for state in (exp_avgs, exp_avg_sqs))
        dtype = wide_dtype(*weights, *found, *means, *squares)
        signed = [x.to(dtype) for x in found]
        if maximize:
            signed = list(torch._foreach_neg(signed))
        counts = None if steps is None else steps[part]
        first = chosen.stream + 1 + STREAMS * (part.start or 0)
        moved = torch._foreach_mul(signed, signed)
        torch._foreach_add_(moved, eps[0])
        torch._foreach_lerp_(moved, [x.to(dtype) for x in squares], betas[1])
        stored = kept(exp_avg_sqs[part], moved, counts, chosen.seed, first + 1)
        updates = list(torch._foreach_rsqrt(stored))
        torch._foreach_mul_(updates, signed)
        for x, u in zip(stored, updates, strict=True):
            u.masked_fill_(x <= 0, 0.0)  # in few bits a small second moment may have become 0
        clip = _clip_(updates, clip_threshold, reduce)
        means = list(torch._foreach_lerp([x.to(dtype) for x in means], updates, 1 - betas[0]))
        kept(exp_avgs[part], means, counts, chosen.seed, first)
        _move_(weights, means, lr, weight_decay)
        return clip

    states, whole = (exp_avgs, exp_avg_sqs), reduce is not None
    return update_by_spans(update, params, grads, states, steps, chosen, whole=whole, left_out=1.0)


def check_factors(params: Sequence[Tensor], states: Sequence[FactoredState]) -> None:
    """Refuse parameters that are no matrices, and factors of another shape.

    Args:
        params: of at least two dimensions.
        states: of each of them.

    Raises:
        ValueError: if they do not fit.
    """
    check_columns("came_update_", {"states": states})
    if len(params) != len(states):
        raise ValueError(
            f"came_update_ got {len(params)} params and {len(states)} states; give one for each"
        )
    for x, state in zip(params, states, strict=True):
        if x.dim() < 2:
            raise ValueError(
                f"came_update_ got params of shape {tuple(x.shape)}; came_vector_update_ is for "
                "what has fewer than two dimensions"
            )
        wanted = [x.shape[0], x.shape[1:].numel()] * 2
        if [len(y) for y in state] != wanted:
            raise ValueError(
                f"came_update_ got states of {[len(y) for y in state]} entries for params of shape "
                f"{tuple(x.shape)}; they must have {wanted}"
            )
        if any(y.device != x.device for y in state):
            raise ValueError(f"came_update_ got params on {x.device} and states elsewhere")
    check_overlaps("came_update_", {"states": list(chain(*states))})


def _factors(
    matrices: Sequence[Tensor],
    kept: Sequence[tuple[Tensor, ...]],
    beta: float,
    eps: float,
    reduce: Reduce | None,
    out: Sequence[Tensor],
) -> Factors:
    """Move the means of rows and columns of squares, written to `out`; return those of 1/√V."""
    parts = []
    for x, (row, _), y in zip(matrices, kept, out, strict=True):
        squares = torch.mul(x, x, out=y)  # norms of columns would take eight times as long
        row.lerp_((squares.sum(1) / max(x.shape[1], 1) + eps).to(row.dtype), 1 - beta)
        columns = squares.sum(0) + len(x) * eps
        parts += [columns, row.to(x.dtype).sum()[None], x.new_tensor([len(x)])]
    sizes = [len(x) for x in parts]
    if reduce is not None:
        parts = list(reduce(torch.cat(parts)).split(sizes))
    found = []
    for i, (row, col) in enumerate(kept):
        columns, total, count = parts[3 * i : 3 * i + 3]
        col.lerp_((columns / count.clamp_min(1)).to(col.dtype), 1 - beta)
        wide = columns.dtype
        found.append((row_factor(row.to(wide), total, count), col.to(wide).rsqrt()))
    return found


def _clip_(updates: list[Tensor], threshold: float, reduce: Reduce | None) -> Tensor:
    """Clip each update by its RMS; return by what."""
    squares = foreach_sq_norms(updates)
    sums = torch.stack([squares, squares.new_tensor([u.numel() for u in updates])], dim=1)
    clip = clip_factor(sums if reduce is None else reduce(sums.view(-1)).view_as(sums), threshold)
    torch._foreach_mul_(updates, list(clip.unbind()))
    return clip


def _momenta_(
    states: States,
    means: Sequence[Tensor],
    updates: list[Tensor],
    beta: float,
    bits: Bits,
) -> list[Tensor]:
    """Move the momenta; return them, in the updates' dtype, as they are stored."""
    moved = [m.to(u.dtype) for m, u in zip(means, updates, strict=True)]
    torch._foreach_lerp_(moved, updates, 1 - beta)
    return kept(states, moved, *bits)


def _scaled(matrices: Sequence[Tensor], factors: Factors, out: Sequence[Tensor]) -> None:
    """Write each matrix, its rows and columns multiplied by factors."""
    for x, (row, col), y in zip(matrices, factors, out, strict=True):
        torch.mul(x, row[:, None], out=y).mul_(col)


def _move_(
    params: Sequence[Tensor], steps: list[Tensor], lr: Tensor | float, weight_decay: float
) -> None:
    """The step θ ← (1 − lr·λ)θ − lr·step."""
    moved = [x.to(u.dtype) for x, u in zip(params, steps, strict=True)]
    if weight_decay:
        torch._foreach_mul_(moved, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(moved, torch._foreach_mul(steps, lr))
    else:
        torch._foreach_sub_(moved, steps, alpha=lr)
    for x, new in zip(params, moved, strict=True):
        if x is not new:
            x.copy_(new)
