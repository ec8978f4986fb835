"""CAME over lists of parameters that are no matrices: second moments, ratios, then the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._updates._checks import Options
from lightning_ext.functional._updates._factored import Reduce, clip_factor
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._states._columns import State
from lightning_ext.kernels._triton._updates._layout import (
    grad_factor,
    is_left_out,
    launch_over,
    load_column,
    load_count,
    load_state_of,
    number,
    offsets_of,
    store_state_of,
)
from lightning_ext.kernels._triton._updates._trust_sums import add_up, store_sums
from lightning_ext.kernels._triton._updates._weights import load_weight, store_weight

_BLOCK, _WARPS, _STEP = 1024, 8, 1024


@triton.jit
def _bits(tile, random, L: tl.constexpr):
    step = 0
    if L.states[0] == 3:
        step = load_count(tile, 2)
    return (random[0], step, random[1])


@triton.jit
def _update(grad, square):
    positive = square > 0
    return tl.where(positive, tl.div_rn(grad, tl.sqrt_rn(tl.where(positive, square, 1.0))), 0.0)


@triton.jit
def _move(
    tile, partials, factor, rates, bits,
    MOVE: tl.constexpr, SUMS: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    V: tl.constexpr = L.states[1]
    grad = load_column(tile, 1, L, MASKED) * factor
    square = load_state_of(tile, V, L, MASKED, not MOVE)
    if MOVE:
        new = grad * grad + number(rates[2], False)
        square = number(rates[0], False) * square + number(rates[1], False) * new
        square = store_state_of(tile, square, bits, 1, V, L, MASKED)
    if SUMS:
        u = _update(grad, square)
        store_sums(partials, u, u, offsets_of(tile, L), tile[4], MASKED)


@triton.jit(do_not_specialize=["count"])
def came_vector_squares_kernel(
    table, chunks, count, books, partials, scaling, random, rates,
    MOVE: tl.constexpr, SUMS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Move the second moments, or take them as they are stored; leave Σû² of the tile."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    bits = _bits(tile, random, L)
    if start + L.block <= size:
        _move(tile, partials, grad_factor(scaling), rates, bits, MOVE, SUMS, L, False)
    else:
        _move(tile, partials, grad_factor(scaling), rates, bits, MOVE, SUMS, L, True)


@triton.jit(do_not_specialize=["count"])
def came_vector_clip_kernel(
    table, partials, sums, clip, count, scaling, threshold, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """Σû², the number of entries, and 1/max(1, RMS(û)/d) of each tensor; 0 and 1 if left out."""
    tensor = tl.program_id(0)
    square, _ = add_up(partials, table, count, tensor, BLOCK, STEP)
    if is_left_out(scaling):
        square = tl.cast(0.0, tl.float32)
    entries = tl.load(table + tensor).to(tl.float32)
    tl.store(sums + 2 * tensor, square)
    tl.store(sums + 2 * tensor + 1, entries)
    rms = tl.sqrt_rn(tl.div_rn(square, tl.maximum(entries, 1.0)))
    over = tl.maximum(tl.div_rn(rms, number(threshold, False)), 1.0)
    tl.store(clip + tensor, tl.div_rn(1.0, over))


@triton.jit
def _step(tile, factor, rate, lr, weight_decay, bits, L: tl.constexpr, MASKED: tl.constexpr):
    M: tl.constexpr = L.states[0]
    square = load_state_of(tile, L.states[1], L, MASKED, True)
    u = _update(load_column(tile, 1, L, MASKED), square) * factor
    mean = load_state_of(tile, M, L, MASKED, False)
    mean += rate * (u - mean)
    store_state_of(tile, mean, bits, 0, M, L, MASKED)
    w = load_weight(tile, offsets_of(tile, L), L, MASKED) * (1.0 - lr * weight_decay)
    store_weight(tile, offsets_of(tile, L), w - lr * mean, bits, L, MASKED)


@triton.jit(do_not_specialize=["count"])
def came_vector_step_kernel(
    table, chunks, count, books, clip, lr, scaling, random, rate, weight_decay,
    LR_ON_DEVICE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The steps m ← β₁m + (1 − β₁)û and θ ← (1 − lr·λ)θ − lr·m."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    bits = _bits(tile, random, L)
    factor = grad_factor(scaling) * tl.load(clip + tensor)
    scale, decay, share = number(lr, LR_ON_DEVICE), number(weight_decay, False), number(rate, False)
    if start + L.block <= size:
        _step(tile, factor, share, scale, decay, bits, L, False)
    else:
        _step(tile, factor, share, scale, decay, bits, L, True)


def came_vector_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[State],
    exp_avg_sqs: Sequence[State],
    steps: Sequence[Tensor] | None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    maximize: bool,
    reduce: Reduce | None,
    options: Options,
) -> Tensor:
    """Launch the kernels; arguments as in ``functional``, checked by the caller."""
    counts = [] if steps is None else [steps]
    lists = [params, grads], [exp_avgs, exp_avg_sqs]
    how: dict[str, Any] = {"others": counts, "beta2": betas[1], "maximize": maximize}
    with launch_over(*lists, _BLOCK, options, **how) as launch:
        given = launch.tables
        head: tuple[Any, ...] = given.table, given.chunks, given.count, launch.books
        shared: dict[str, Any] = {"L": launch.layout, "num_warps": _WARPS}
        partials = given.table.new_empty(given.programs, 2, dtype=torch.float32)
        sums, clip = partials.new_empty(given.count, 2), partials.new_empty(given.count)
        rates, grid = (float(betas[1]), 1.0 - betas[1], float(eps[0])), (given.programs,)
        keeps = launch.layout.keeps
        for moves, leaves in ((True, keeps), (False, True))[: 1 if keeps else 2] if grid[0] else ():
            came_vector_squares_kernel[grid](
                *head, partials, launch.scaling, launch.random, rates, MOVE=moves, SUMS=leaves,
                **shared,
            )  # fmt: skip
        came_vector_clip_kernel[(given.count,)](
            given.table, partials, sums, clip, given.count, launch.scaling, float(clip_threshold),
            BLOCK=_BLOCK, STEP=_STEP, num_warps=4,
        )  # fmt: skip
        if reduce is not None:
            clip = clip_factor(reduce(sums.view(-1)).view_as(sums), clip_threshold)
        if grid[0]:
            came_vector_step_kernel[grid](
                *head, clip, lr, launch.scaling, launch.random, 1.0 - betas[0], float(weight_decay),
                LR_ON_DEVICE=isinstance(lr, Tensor), **shared,
            )  # fmt: skip
    return clip
