"""AdamP over lists of parameters: moments and sums of rows, sums of tensors, then the step.

A program adds up whole rows, so that no sum depends on the order in which programs run. The
direction is made again: from plain moments, which the first launch writes; else from the old ones
and the gradient, as a second moment in few bits may have lost nearly all of its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._updates._checks import Options
from lightning_ext.functional._updates._radial_projection import Reduce
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._states._columns import State
from lightning_ext.kernels._triton._updates._layout import (
    Launch,
    grad_factor,
    is_left_out,
    launch_over,
    load_column,
    number,
    offsets_of,
)
from lightning_ext.kernels._triton._updates._moments import (
    adam_direction,
    inverse_corrections,
    load_moments,
    log_betas_of,
    moved_moments,
    next_moments,
    rates_of,
)
from lightning_ext.kernels._triton._updates._rows import (
    RowTables,
    load_entries,
    load_state_entries,
    locate_rows,
    row_tables,
    rows_of,
    store_entries,
)
from lightning_ext.kernels._triton._updates._weights import load_weight, store_weight

_BLOCK, _WARPS = 1024, 8
_ROWS, _COLUMNS = 4, 256
_STEP = 1024  # rows that are added at a time
_SUMS = 6


@triton.jit
def _moments_of(tile, offsets, grad, rates, MOVE: tl.constexpr, L: tl.constexpr):
    """The moments of some entries after a step, as they are stored where MOVE."""
    M: tl.constexpr = L.states[0]
    V: tl.constexpr = L.states[1]
    mean = load_state_entries(tile, offsets, M, L, False)
    square = load_state_entries(tile, offsets, V, L, False)
    mean, square = next_moments(mean, square, grad, rates)
    if MOVE:
        mean = store_entries(tile, offsets, mean, M, L)
        square = store_entries(tile, offsets, square, V, L)
    return mean, square


@triton.jit
def _numerator(mean, grad, rates, NESTEROV: tl.constexpr):
    if NESTEROV:
        mean += number(rates[0], False) * (grad - mean)
    return mean


@triton.jit(do_not_specialize=["count"])
def adamp_rows_kernel(
    table, count, books, shapes, tiles, sums, scaling, rates, log_betas, eps,
    MOVE: tl.constexpr, NESTEROV: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave g·w, g·g, w·w and p·w of rows, and move the moments where MOVE."""
    if is_left_out(scaling):
        return
    tensor, rows, width, before, row = locate_rows(shapes, tiles, ROWS)
    size = tl.load(table + tensor)
    tile = (table, count, tensor, 0, size, books)
    _, first, second = inverse_corrections(tile, log_betas, True)
    factor = grad_factor(scaling)
    gw = tl.zeros((ROWS, COLUMNS), tl.float32)
    gg = tl.zeros((ROWS, COLUMNS), tl.float32)
    ww = tl.zeros((ROWS, COLUMNS), tl.float32)
    pw = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        offsets = row[:, None] * width + column[None, :]
        inside = (offsets < size) & (column < width)[None, :]
        offsets = tl.where(inside, offsets, size)
        w = load_weight(tile, offsets, L, True)
        g = load_entries(tile, offsets, 1, L) * factor
        mean, square = _moments_of(tile, offsets, g, rates, MOVE, L)
        p = adam_direction(_numerator(mean, g, rates, NESTEROV), square, first, second, eps)
        gw += g * w
        gg += g * g
        ww += w * w
        pw += tl.where(inside, p * w, 0.0)
    pointer = sums + 4 * (before + row)
    there = row < rows
    tl.store(pointer, tl.sum(gw, axis=1), mask=there)
    tl.store(pointer + 1, tl.sum(gg, axis=1), mask=there)
    tl.store(pointer + 2, tl.sum(ww, axis=1), mask=there)
    tl.store(pointer + 3, tl.sum(pw, axis=1), mask=there)


@triton.jit
def _along(dot, grad, weight, bound):
    """Whether cos ≥ bound; not where a norm is 0."""
    scale = tl.sqrt_rn(grad) * tl.sqrt_rn(weight)
    return (tl.abs(dot) >= bound * scale) & (scale > 0)


@triton.jit
def adamp_totals_kernel(shapes, sums, totals, delta, STEP: tl.constexpr):
    """Leave, of each tensor, the sums of its rows, how many are not orthogonal, its entries."""
    tensor = tl.program_id(0).to(tl.int64)
    rows = tl.load(shapes + 4 * tensor)
    width = tl.load(shapes + 4 * tensor + 1)
    before = tl.load(shapes + 4 * tensor + 2)
    bound = tl.div_rn(number(delta, False), tl.sqrt_rn(tl.maximum(width, 1).to(tl.float32)))
    gw, gg = tl.zeros((STEP,), tl.float32), tl.zeros((STEP,), tl.float32)
    ww, pw = tl.zeros((STEP,), tl.float32), tl.zeros((STEP,), tl.float32)
    counted = tl.zeros((STEP,), tl.float32)
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        pointer = sums + 4 * (before + row)
        dot = tl.load(pointer, mask=row < rows, other=0)
        grad = tl.load(pointer + 1, mask=row < rows, other=0)
        weight = tl.load(pointer + 2, mask=row < rows, other=0)
        gw, gg, ww = gw + dot, gg + grad, ww + weight
        pw += tl.load(pointer + 3, mask=row < rows, other=0)
        counted += _along(dot, grad, weight, bound).to(tl.float32)
    pointer = totals + 6 * tensor
    tl.store(pointer, tl.sum(gw))
    tl.store(pointer + 1, tl.sum(gg))
    tl.store(pointer + 2, tl.sum(ww))
    tl.store(pointer + 3, tl.sum(pw))
    tl.store(pointer + 4, tl.sum(counted))
    tl.store(pointer + 5, (rows * width).to(tl.float32))


@triton.jit
def _over(x, square):
    positive = square > 0
    return tl.where(positive, tl.div_rn(x, tl.where(positive, square, 1.0)), 0.0)


@triton.jit
def _share(tile, shapes, sums, totals, delta, L: tl.constexpr):
    """What is taken out of the entries of a tile along the weights, and whether it is."""
    tensor, start, size = tile[2].to(tl.int64), tile[3], tile[4]
    width = tl.load(shapes + 4 * tensor + 1)
    pointer = totals + 6 * tensor
    weight = tl.load(pointer + 2)
    entries = tl.load(pointer + 5)
    bound = tl.div_rn(number(delta, False), tl.sqrt_rn(tl.maximum(entries, 1.0)))
    matrix = tl.load(shapes + 4 * tensor + 3) > 0
    by_row = (tl.load(pointer + 4) == 0) & matrix
    whole = (_along(tl.load(pointer), tl.load(pointer + 1), weight, bound) == 0) & matrix
    BLOCK: tl.constexpr = L.block
    share = tl.zeros((BLOCK,), tl.float32) + _over(tl.load(pointer + 3), weight)
    if by_row:
        row, _ = rows_of(start, width, BLOCK)
        there = start + tl.arange(0, BLOCK) < size
        found = sums + 4 * (tl.load(shapes + 4 * tensor + 2) + row)
        update = tl.load(found + 3, mask=there, other=0)
        share = _over(update, tl.load(found + 2, mask=there, other=0))
    projected = by_row | whole
    return tl.where(projected, share, 0.0), projected


@triton.jit
def _step(
    tile, shapes, sums, totals, flags, lr, factor, random, rates, log_betas, eps, weight_decay,
    wd_ratio, delta, MOVE: tl.constexpr, NESTEROV: tl.constexpr, L: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    step, first, second = inverse_corrections(tile, log_betas, True)
    bits = (random[0], step.to(tl.int64), random[1])
    if MOVE:
        grad = load_column(tile, 1, L, MASKED) * factor
        mean, square = moved_moments(tile, grad, rates, bits, True, L, MASKED)
    else:
        mean, square = load_moments(tile, L, MASKED, True)
    w = load_weight(tile, offsets_of(tile, L), L, MASKED)
    if NESTEROV:
        mean = _numerator(mean, load_column(tile, 1, L, MASKED) * factor, rates, True)
    p = adam_direction(mean, square, first, second, eps)
    share, projected = _share(tile, shapes, sums, totals, delta, L)
    lost = lr * number(weight_decay, False)
    lost = tl.where(projected, lost * number(wd_ratio, False), lost)
    w = w * (1.0 - lost) - lr * (p - share * w)
    store_weight(tile, offsets_of(tile, L), w, bits, L, MASKED)
    if tile[3] == 0:
        tl.store(flags + tile[2], projected.to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def adamp_step_kernel(
    table, chunks, count, books, shapes, sums, totals, flags, lr, scaling, random, rates, log_betas,
    eps, weight_decay, wd_ratio, delta,
    LR_ON_DEVICE: tl.constexpr, MOVE: tl.constexpr, NESTEROV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The step w ← (1 − lr·λ·ρ)w − lr·(p − c·w), before it that of the moments where MOVE."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    rate, factor = number(lr, LR_ON_DEVICE), grad_factor(scaling)
    if start + L.block <= size:
        _step(
            tile, shapes, sums, totals, flags, rate, factor, random, rates, log_betas, eps,
            weight_decay, wd_ratio, delta, MOVE, NESTEROV, L, False,
        )  # fmt: skip
    else:
        _step(
            tile, shapes, sums, totals, flags, rate, factor, random, rates, log_betas, eps,
            weight_decay, wd_ratio, delta, MOVE, NESTEROV, L, True,
        )  # fmt: skip


def adamp_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[State],
    exp_avg_sqs: Sequence[State],
    steps: Sequence[Tensor],
    *,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    maximize: bool,
    reduce: Reduce | None,
    options: Options,
) -> Tensor:
    """Launch the kernels; arguments as in ``functional.adamp_update_``, checked by the caller."""
    flags = torch.zeros(len(params), device=params[0].device)
    rows = row_tables([x.shape for x in params], _ROWS, flags.device)
    with launch_over(
        [params, grads],
        [exp_avgs, exp_avg_sqs],
        _BLOCK,
        options,
        maximize=maximize,
        others=[steps],
        beta2=betas[1],
        row_major=True,
    ) as launch:
        if not launch.tables.programs and reduce is None:
            return flags
        shared: dict[str, Any] = {
            "scaling": launch.scaling,
            "rates": rates_of(betas),
            "log_betas": log_betas_of(betas),
            "eps": float(eps),
            "NESTEROV": nesterov,
            "L": launch.layout,
        }
        keeps = launch.layout.keeps
        sums, totals = _launch_sums(launch, rows, delta, shared, moves=keeps)
        totals = totals if reduce is None else reduce(totals)
        if launch.tables.programs:
            # Registers for which the compiler needs no memory.
            many = launch.layout.weight == "stochastic" or not keeps
            warps = 4 if many else _WARPS
            adamp_step_kernel[(launch.tables.programs,)](
                launch.tables.table,
                launch.tables.chunks,
                launch.tables.count,
                launch.books,
                rows.shapes,
                sums,
                totals,
                flags,
                lr,
                random=launch.random,
                weight_decay=float(weight_decay),
                wd_ratio=float(wd_ratio),
                delta=float(delta),
                MOVE=not keeps,
                LR_ON_DEVICE=isinstance(lr, Tensor),
                num_warps=warps,
                **shared,
            )
    return flags


def _launch_sums(
    launch: Launch, rows: RowTables, delta: float, shared: dict[str, Any], *, moves: bool
) -> tuple[Tensor, Tensor]:
    """Sums of the rows, shape (rows, 4), and of the tensors, (tensors, 6)."""
    sums = rows.shapes.new_empty(rows.rows, 4, dtype=torch.float32)
    totals = sums.new_empty(len(rows.shapes), _SUMS)
    if len(rows.tiles):
        adamp_rows_kernel[(len(rows.tiles),)](
            launch.tables.table,
            launch.tables.count,
            launch.books,
            rows.shapes,
            rows.tiles,
            sums,
            MOVE=moves,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
            **shared,
        )
    adamp_totals_kernel[(len(rows.shapes),)](
        rows.shapes, sums, totals, float(delta), STEP=_STEP, num_warps=4
    )
    return sums, totals
