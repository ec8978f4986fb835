"""Sums of the rows and of the columns of many matrices, by tiles, and means that follow them.

A tile leaves the sums of its rows and of its columns; a launch adds up those of all tiles, each row
and column in one program, so that no sum depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._kept import kept, on_device
from lightning_ext.kernels._triton._updates._layout import Launch, is_left_out, number

ROWS, COLUMNS = 32, 128  # of a tile
_SEGMENT = 256  # rows or columns of a program that adds them up
_STEP = 1024
_NUMBERS = tl.constexpr(6)  # in a row of `shapes`


class Matrices(NamedTuple):
    """Where the tiles of a list of matrices are, and what they leave.

    Attributes:
        shapes: of each matrix rows, columns, and where begin its sums of rows in those of all
            tiles, its sums of columns, its vector (sums of columns, total of row means, rows), and
            its tiles; shape (matrices, 6).
        tiles: matrix, block of rows, block of columns of each program; shape (programs, 3).
        segments: matrix, 1 for columns, and segment of each; shape (programs, 3).
        column_segments: those of columns.
        sizes: sums of rows, of columns, and vectors, of all.
    """

    shapes: Tensor
    tiles: Tensor
    segments: Tensor
    column_segments: Tensor
    sizes: tuple[int, int, int]


class Sums(NamedTuple):
    """What tiles leave: their sums of rows, [block of columns, row], and of columns."""

    rows: Tensor
    columns: Tensor


def matrices_of(shapes: Sequence[torch.Size], device: torch.device) -> Matrices:
    """Return the tables of a list of matrices."""
    return _build(device, tuple(shapes))


@kept
def _build(device: torch.device, shapes: tuple[torch.Size, ...]) -> Matrices:
    entries, tiles, segments = [], [], []
    sizes, programs = [0, 0, 0], 0
    for i, shape in enumerate(shapes):
        rows, columns = shape[0], shape[1:].numel()
        down, across = -(-rows // ROWS), -(-columns // COLUMNS)
        entries.append([rows, columns, *sizes, programs])
        block = torch.cartesian_prod(torch.tensor([i]), torch.arange(down), torch.arange(across))
        tiles.append(block.view(-1, 3))
        for kind, length in enumerate((rows, columns)):
            segments += [[i, kind, k] for k in range(-(-length // _SEGMENT))]
        sizes = [sizes[0] + rows * across, sizes[1] + down * columns, sizes[2] + columns + 2]
        programs += down * across
    by_columns = [x for x in segments if x[1] == 1]
    widths = ((entries, 6), (torch.cat(tiles).tolist(), 3), (segments, 3), (by_columns, 3))
    placed = [on_device(x, torch.int64, device).view(-1, n) for x, n in widths]
    return Matrices(placed[0], placed[1], placed[2], placed[3], (sizes[0], sizes[1], sizes[2]))


@triton.jit
def locate_tile(shapes, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The matrix of this program, its shape, and the rows and columns of its tile."""
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles + 3 * program)
    row = tl.load(tiles + 3 * program + 1) * ROWS + tl.arange(0, ROWS)
    column = tl.load(tiles + 3 * program + 2) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.load(shapes + _NUMBERS * matrix)
    columns = tl.load(shapes + _NUMBERS * matrix + 1)
    return matrix, rows, columns, row, column


@triton.jit
def entries_of(row, column, rows, columns):
    """The entries of a tile; those outside of the matrix are its size."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.where(inside, row[:, None] * columns + column[None, :], rows * columns)


@triton.jit
def leave_sums(
    x, shapes, matrix, rows, columns, row, column, row_sums, column_sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leave the sums of the rows and columns of a tile, which is 0 outside of the matrix."""
    first = row_sums + tl.load(shapes + _NUMBERS * matrix + 2)
    across = column // COLUMNS  # the same for all
    down = row // ROWS
    tl.store(first + tl.max(across, axis=0) * rows + row, tl.sum(x, axis=1), mask=row < rows)
    first = column_sums + tl.load(shapes + _NUMBERS * matrix + 3)
    where = first + tl.max(down, axis=0) * columns + column
    tl.store(where, tl.sum(x, axis=0), mask=column < columns)


@triton.jit
def state_pointer(table, count, column, matrix):
    """A float32 tensor out of a column."""
    return multi.address(table, count, column, matrix).to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["count"])
def matrix_means_kernel(
    table, count, shapes, segments, row_sums, column_sums, vectors, scaling, keep, rate, eps,
    ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Move the means of rows in the column ROW; leave the sums of columns in the vectors."""
    if is_left_out(scaling):
        return
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(segments + 3 * program)
    lane = tl.load(segments + 3 * program + 2) * SEGMENT + tl.arange(0, SEGMENT)
    rows = tl.load(shapes + _NUMBERS * matrix)
    columns = tl.load(shapes + _NUMBERS * matrix + 1)
    total = tl.zeros((SEGMENT,), tl.float32)
    if tl.load(segments + 3 * program + 1) == 0:
        first = row_sums + tl.load(shapes + _NUMBERS * matrix + 2)
        for k in range(0, (columns + COLUMNS - 1) // COLUMNS):
            total += tl.load(first + k * rows + lane, mask=lane < rows, other=0)
        mean = tl.div_rn(total, tl.maximum(columns, 1).to(tl.float32)) + number(eps, False)
        pointer = state_pointer(table, count, ROW, matrix) + lane
        old = tl.load(pointer, mask=lane < rows, other=0)
        moved = number(keep, False) * old + number(rate, False) * mean
        tl.store(pointer, moved, mask=lane < rows)
    else:
        first = column_sums + tl.load(shapes + _NUMBERS * matrix + 3)
        for k in range(0, (rows + ROWS - 1) // ROWS):
            total += tl.load(first + k * columns + lane, mask=lane < columns, other=0)
        total += number(eps, False) * rows.to(tl.float32)
        vector = vectors + tl.load(shapes + _NUMBERS * matrix + 4)
        tl.store(vector + lane, total, mask=lane < columns)


@triton.jit(do_not_specialize=["count"])
def matrix_totals_kernel(table, count, shapes, vectors, ROW: tl.constexpr, STEP: tl.constexpr):
    """Leave the total of the means of rows and their number behind the sums of columns."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.load(shapes + _NUMBERS * matrix)
    pointer = state_pointer(table, count, ROW, matrix)
    total = tl.zeros((STEP,), tl.float32)
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        total += tl.load(pointer + row, mask=row < rows, other=0)
    vector = vectors + tl.load(shapes + _NUMBERS * matrix + 4)
    vector += tl.load(shapes + _NUMBERS * matrix + 1)
    tl.store(vector, tl.sum(total))
    tl.store(vector + 1, rows.to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def matrix_columns_kernel(
    table, count, shapes, segments, vectors, scaling, keep, rate,
    COLUMN: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Move the means of columns in the column COLUMN by their sums over all shards."""
    if is_left_out(scaling):
        return
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(segments + 3 * program)
    lane = tl.load(segments + 3 * program + 2) * SEGMENT + tl.arange(0, SEGMENT)
    columns = tl.load(shapes + _NUMBERS * matrix + 1)
    vector = vectors + tl.load(shapes + _NUMBERS * matrix + 4)
    rows = tl.maximum(tl.load(vector + columns + 1), 1.0)
    mean = tl.div_rn(tl.load(vector + lane, mask=lane < columns, other=0), rows)
    pointer = state_pointer(table, count, COLUMN, matrix) + lane
    old = tl.load(pointer, mask=lane < columns, other=0)
    moved = number(keep, False) * old + number(rate, False) * mean
    tl.store(pointer, moved, mask=lane < columns)


@triton.jit
def load_factors(
    table, count, shapes, vectors, matrix, rows, columns, row, column,
    ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """1/√(r/mean(r)) of rows and 1/√c of columns; 0 outside of the matrix."""
    vector = vectors + tl.load(shapes + _NUMBERS * matrix + 4) + columns
    scale = tl.div_rn(tl.maximum(tl.load(vector + 1), 1.0), tl.load(vector))
    r = tl.load(state_pointer(table, count, ROW, matrix) + row, mask=row < rows, other=1)
    pointer = state_pointer(table, count, COLUMN, matrix) + column
    c = tl.load(pointer, mask=column < columns, other=1)
    by_row = tl.where(row < rows, tl.div_rn(1.0 + 0 * r, tl.sqrt_rn(r * scale)), 0.0)
    by_column = tl.where(column < columns, tl.div_rn(1.0 + 0 * c, tl.sqrt_rn(c)), 0.0)
    return by_row, by_column


def move_means(
    launch: Launch,
    found: Matrices,
    sums: Sums,
    columns: tuple[int, int],
    beta: float,
    eps: float,
    reduce: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Move the means of rows and columns by what tiles left; return the vectors of all.

    Args:
        launch: over the matrices.
        found: their tables.
        sums: what tiles left.
        columns: those that the means of rows and of columns are in.
        beta: share of the old means.
        eps: what is added to the new ones.
        reduce: adds up a vector over shards.
    """
    given = launch.tables
    vectors = sums.rows.new_empty(found.sizes[2])
    rates = float(beta), 1.0 - beta
    if len(found.segments):
        matrix_means_kernel[(len(found.segments),)](
            given.table, given.count, found.shapes, found.segments, *sums, vectors, launch.scaling,
            *rates, float(eps), ROW=columns[0], ROWS=ROWS, COLUMNS=COLUMNS, SEGMENT=_SEGMENT,
            num_warps=4,
        )  # fmt: skip
    matrix_totals_kernel[(given.count,)](
        given.table, given.count, found.shapes, vectors, ROW=columns[0], STEP=_STEP, num_warps=4
    )
    vectors = vectors if reduce is None else reduce(vectors)
    if len(found.column_segments):
        matrix_columns_kernel[(len(found.column_segments),)](
            given.table, given.count, found.shapes, found.column_segments, vectors,
            launch.scaling, *rates, COLUMN=columns[1], SEGMENT=_SEGMENT, num_warps=4,
        )  # fmt: skip
    return vectors
