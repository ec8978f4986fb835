"""CAME over lists of matrices: factors, the clipped update, momentum and residual, factors, step.

The update is made again from gradient and factors, so that nothing of the parameters' size is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._updates._checks import Options
from lightning_ext.functional._updates._factored import FactoredState, Reduce, clip_factor
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._states._columns import State, state_format
from lightning_ext.kernels._triton._updates._layout import (
    Launch,
    grad_factor,
    is_left_out,
    launch_over,
    load_column,
    load_count,
    load_state_of,
    number,
    store_state_of,
)
from lightning_ext.kernels._triton._updates._matrices import (
    COLUMNS,
    ROWS,
    Matrices,
    Sums,
    entries_of,
    leave_sums,
    load_factors,
    locate_tile,
    matrices_of,
    move_means,
)
from lightning_ext.kernels._triton._updates._rows import (
    load_entries,
    load_state_entries,
    rows_of,
    store_entries,
)
from lightning_ext.kernels._triton._updates._weights import load_weight, store_weight

_BLOCK, _WARPS = 1024, 8
_STEP = 1024
# Columns of a launch: parameters, gradients, then these four, counts of steps, momenta.
_SQ_ROW, _SQ_COL, _RES_ROW, _RES_COL = (tl.constexpr(i) for i in (2, 3, 4, 5))


@triton.jit(do_not_specialize=["count"])
def came_squares_kernel(
    table, count, shapes, tiles, scaling, row_sums, column_sums,
    L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave the sums of g² of rows and columns."""
    matrix, rows, columns, row, column = locate_tile(shapes, tiles, ROWS, COLUMNS)
    tile = (table, count, matrix, 0, rows * columns, table)
    offsets = entries_of(row, column, rows, columns)
    g = load_entries(tile, offsets, 1, L) * grad_factor(scaling)
    leave_sums(
        g * g, shapes, matrix, rows, columns, row, column, row_sums, column_sums, ROWS, COLUMNS
    )


@triton.jit
def _update(
    tile, offsets, factor, shapes, vectors, matrix, rows, columns, row, column, L: tl.constexpr
):
    """û before it is clipped, 0 outside of the matrix."""
    by_row, by_column = load_factors(
        tile[0], tile[1], shapes, vectors, matrix, rows, columns, row, column, _SQ_ROW, _SQ_COL
    )
    g = load_entries(tile, offsets, 1, L) * factor
    return g * by_row[:, None] * by_column[None, :]


@triton.jit(do_not_specialize=["count"])
def came_clip_sums_kernel(
    table, count, shapes, tiles, vectors, scaling, partials,
    L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave Σû² of each tile."""
    matrix, rows, columns, row, column = locate_tile(shapes, tiles, ROWS, COLUMNS)
    tile = (table, count, matrix, 0, rows * columns, table)
    offsets = entries_of(row, column, rows, columns)
    factor = grad_factor(scaling)
    u = _update(tile, offsets, factor, shapes, vectors, matrix, rows, columns, row, column, L)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(tl.sum(u * u, axis=1), axis=0))


@triton.jit
def came_clip_kernel(
    shapes, partials, sums, clip, scaling, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Σû², the number of entries, and 1/max(1, RMS(û)/d) of each matrix; 0 and 1 if left out."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.load(shapes + 6 * matrix)
    columns = tl.load(shapes + 6 * matrix + 1)
    pointer = partials + tl.load(shapes + 6 * matrix + 5)
    tiles = ((rows + ROWS - 1) // ROWS) * ((columns + COLUMNS - 1) // COLUMNS)
    total = tl.zeros((STEP,), tl.float32)
    for start in range(0, tiles, STEP):
        lane = start + tl.arange(0, STEP)
        total += tl.load(pointer + lane, mask=lane < tiles, other=0)
    square, entries = tl.sum(total), (rows * columns).to(tl.float32)
    if is_left_out(scaling):
        square = tl.cast(0.0, tl.float32)
    tl.store(sums + 2 * matrix, square)
    tl.store(sums + 2 * matrix + 1, entries)
    rms = tl.sqrt_rn(tl.div_rn(square, tl.maximum(entries, 1.0)))
    over = tl.maximum(tl.div_rn(rms, number(threshold, False)), 1.0)
    tl.store(clip + matrix, tl.div_rn(1.0, over))


@triton.jit
def _move(tile, shapes, vectors, factor, rate, bits, L: tl.constexpr, MASKED: tl.constexpr):
    table, count, matrix, start, _, _ = tile
    rows = tl.load(shapes + 6 * matrix)
    columns = tl.load(shapes + 6 * matrix + 1)
    BLOCK: tl.constexpr = L.block
    row, column = rows_of(start, columns, BLOCK)
    by_row, by_column = load_factors(
        table, count, shapes, vectors, matrix, rows, columns, row, column, _SQ_ROW, _SQ_COL
    )
    u = load_column(tile, 1, L, MASKED) * factor * by_row * by_column
    mean = load_state_of(tile, L.states[0], L, MASKED, False)
    store_state_of(tile, mean + rate * (u - mean), bits, 0, L.states[0], L, MASKED)


@triton.jit
def _bits(tile, random, L: tl.constexpr):
    """Seed, step and first stream."""
    step = 0
    if L.states[0] == 7:
        step = load_count(tile, 6)
    return (random[0], step, random[1])


@triton.jit(do_not_specialize=["count"])
def came_move_kernel(
    table, chunks, count, books, shapes, vectors, clip, scaling, random, rate,
    L: tl.constexpr,
):  # fmt: skip
    """Move momenta whose format knows blocks of consecutive entries alone."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor.to(tl.int64), start, size, books)
    bits = _bits(tile, random, L)
    factor, share = grad_factor(scaling) * tl.load(clip + tensor), number(rate, False)
    if start + L.block <= size:
        _move(tile, shapes, vectors, factor, share, bits, L, False)
    else:
        _move(tile, shapes, vectors, factor, share, bits, L, True)


@triton.jit(do_not_specialize=["count"])
def came_residual_kernel(
    table, count, books, shapes, tiles, vectors, clip, row_sums, column_sums, scaling, rate,
    MOVE: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave the sums of (û − m)² of rows and columns, of the m that is moved here where MOVE."""
    if is_left_out(scaling):
        return
    matrix, rows, columns, row, column = locate_tile(shapes, tiles, ROWS, COLUMNS)
    tile = (table, count, matrix, 0, rows * columns, books)
    offsets = entries_of(row, column, rows, columns)
    factor = grad_factor(scaling) * tl.load(clip + matrix)
    u = _update(tile, offsets, factor, shapes, vectors, matrix, rows, columns, row, column, L)
    if MOVE:
        mean = load_entries(tile, offsets, L.states[0], L)
        mean += number(rate, False) * (u - mean)
        mean = store_entries(tile, offsets, mean, L.states[0], L)
    else:
        mean = load_state_entries(tile, offsets, L.states[0], L, True)
    apart = tl.where(offsets < rows * columns, u - mean, 0.0)
    leave_sums(
        apart * apart, shapes, matrix, rows, columns, row, column, row_sums, column_sums,
        ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def came_step_kernel(
    table, count, books, shapes, tiles, vectors, scaling, random, lr, weight_decay,
    LR_ON_DEVICE: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The step θ ← (1 − lr·λ)θ − lr·m/√S."""
    if is_left_out(scaling):
        return
    matrix, rows, columns, row, column = locate_tile(shapes, tiles, ROWS, COLUMNS)
    tile = (table, count, matrix, 0, rows * columns, books)
    offsets = entries_of(row, column, rows, columns)
    by_row, by_column = load_factors(
        table, count, shapes, vectors, matrix, rows, columns, row, column, _RES_ROW, _RES_COL
    )
    mean = load_state_entries(tile, offsets, L.states[0], L, True)
    rate = number(lr, LR_ON_DEVICE)
    w = load_weight(tile, offsets, L, True) * (1.0 - rate * number(weight_decay, False))
    w -= rate * (mean * by_row[:, None] * by_column[None, :])
    store_weight(tile, offsets, w, _bits(tile, random, L), L, True)


def came_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[State],
    states: Sequence[FactoredState],
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
    """Launch the kernels; arguments as in ``functional.came_update_``, checked by the caller."""
    found = matrices_of([x.shape for x in params], params[0].device)
    counts = [] if steps is None else [steps]
    with ExitStack() as stack:
        means = [list(x) for x in zip(*states, strict=True)]
        factors = stack.enter_context(multi.flat(means, written=range(4)))
        lists = [params, grads], [exp_avgs]
        how: dict[str, Any] = {"others": [*factors, *counts], "maximize": maximize}
        launch = stack.enter_context(launch_over(*lists, _BLOCK, options, row_major=True, **how))
        shared: dict[str, Any] = {"L": launch.layout, "ROWS": ROWS, "COLUMNS": COLUMNS}
        shared |= {"num_warps": _WARPS}
        sums = Sums(
            *(launch.tables.table.new_empty(n, dtype=torch.float32) for n in found.sizes[:2])
        )
        given = launch.tables.table, launch.tables.count
        where = found.shapes, found.tiles
        grid = (len(found.tiles),)
        if grid[0]:
            came_squares_kernel[grid](*given, *where, launch.scaling, *sums, **shared)
        vectors = move_means(launch, found, sums, (2, 3), betas[1], eps[0], reduce)
        clip = _launch_clip(launch, found, vectors, clip_threshold, reduce, shared)
        moves, rate = launch.layout.keeps, 1.0 - betas[0]
        if grid[0] and not moves:
            # Registers for which the compiler needs no memory.
            warps = 4 if state_format(exp_avgs[0]) == "int4_signed" else _WARPS
            came_move_kernel[(launch.tables.programs,)](
                launch.tables.table, launch.tables.chunks, launch.tables.count, launch.books,
                found.shapes, vectors, clip, launch.scaling, launch.random, rate,
                L=launch.layout, num_warps=warps,
            )  # fmt: skip
        if grid[0]:
            came_residual_kernel[grid](
                *given,
                launch.books,
                *where,
                vectors,
                clip,
                *sums,
                launch.scaling,
                rate,
                MOVE=moves,
                **shared,
            )
        vectors = move_means(launch, found, sums, (4, 5), betas[2], eps[1], reduce)
        if grid[0]:
            came_step_kernel[grid](
                *given, launch.books, *where, vectors, launch.scaling, launch.random, lr,
                float(weight_decay),
                LR_ON_DEVICE=isinstance(lr, Tensor), **shared,
            )  # fmt: skip
    return clip


def _launch_clip(
    launch: Launch,
    found: Matrices,
    vectors: Tensor,
    threshold: float,
    reduce: Reduce | None,
    shared: dict[str, Any],
) -> Tensor:
    """What each û is multiplied by."""
    given, programs = launch.tables, len(found.tiles)
    partials, sums = vectors.new_empty(programs), vectors.new_empty(given.count, 2)
    clip = vectors.new_empty(given.count)
    if programs:
        came_clip_sums_kernel[(programs,)](
            given.table, given.count, found.shapes, found.tiles, vectors, launch.scaling, partials,
            **shared,
        )  # fmt: skip
    came_clip_kernel[(given.count,)](
        found.shapes, partials, sums, clip, launch.scaling, float(threshold),
        ROWS=ROWS, COLUMNS=COLUMNS, STEP=_STEP, num_warps=4,
    )  # fmt: skip
    if reduce is None:
        return clip
    return clip_factor(reduce(sums.view(-1)).view_as(sums), threshold)
