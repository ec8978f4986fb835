"""Strips and tiles of a matrix of logits that is never whole in memory.

A launch covers a strip of rows and all columns; each program computes one tile of x yᵀ. What is
left behind is small (partial sums) or staged: a strip of the gradient in the logits, in the inputs'
dtype, which two products then turn into the gradients of x and y. Everything is added up in an
order that only shapes decide, so results are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._interpret import INTERPRETED, capability

LN2 = 0.6931471805599453
_LOG2E = tl.constexpr(1.4426950408889634)
_DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PARTIAL_BYTES = 32 << 20  # of partial results of a strip, rows and columns each


class Blocks(NamedTuple):
    """Sizes of a launch.

    Attributes:
        rows: of a tile of the result.
        columns: likewise.
        depth: entries of the summed dimension that are loaded at once.
        warps: of a program.
        stages: of its pipeline of loads.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Pair(NamedTuple):
    """The factors of the logits as the kernels take them.

    Attributes:
        x: shape (m, d), aligned and padded with zeros to a multiple of a block's depth.
        y: shape (n, d), likewise.
        width: before padding.
        blocks: of a tile of logits.
        settings: what every launch over tiles is given.
    """

    x: Tensor
    y: Tensor
    width: int
    blocks: Blocks
    settings: dict[str, Any]

    def tiles(self, rows: int) -> tuple[int, int]:
        """Return how many tiles the rows and the columns make."""
        return triton.cdiv(rows, self.blocks.rows), triton.cdiv(len(self.y), self.blocks.columns)


def pair(x: Tensor, y: Tensor, *, masked: bool = False) -> Pair:
    """Prepare x and y; they are copied where a row does not start at a multiple of 16 bytes.

    masked: whether a mask is read beside the logits.
    """
    width = x.shape[1]
    precision = _dot_precision(x.dtype)
    blocks = _tile_blocks(x, y, precision, masked)
    x, y = _padded(x, blocks.depth), _padded(y, blocks.depth)
    settings = {
        "stride_x": x.stride(0),
        "stride_y": y.stride(0),
        "width": x.shape[1],
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.depth,
        "DOT_TYPE": tl.float32 if INTERPRETED else _DOT_TYPES[x.dtype],
        "PRECISION": precision,
        "EVEN": len(x) % blocks.rows == 0 and len(y) % blocks.columns == 0,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    return Pair(x, y, width, blocks, settings)


def partial_strips(found: Pair) -> Iterator[tuple[int, int]]:
    """Strips whose partial results, one for each row and tile of columns, stay small."""
    return strips(len(found.x), found.blocks.rows, _PARTIAL_BYTES // (8 * found.tiles(1)[1]))


def strides_of(excluded: Tensor | None) -> tuple[int, int]:
    return (0, 0) if excluded is None else (excluded.stride(0), excluded.stride(1))


def strips(rows: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """First row and the row behind the last one of strips of whole blocks."""
    step = max(block, most // block * block)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: exactly, unless torch was told to use TF32 in its own."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def _padded(x: Tensor, depth: int) -> Tensor:
    """X itself if its rows are loaded 16 bytes at once, in whole blocks, else such a copy."""
    row = x.stride(0) * x.element_size()
    blocks = max(1, triton.cdiv(x.shape[1], depth))
    if (
        x.shape[1] == blocks * depth
        and x.stride(1) == 1
        and row % 16 == 0
        and x.data_ptr() % 16 == 0
    ):
        return x
    copy = x.new_zeros(len(x), blocks * depth)
    copy[:, : x.shape[1]] = x
    return copy


def _tile_blocks(x: Tensor, y: Tensor, precision: str, masked: bool) -> Blocks:
    """Blocks of a tile of logits.

    Half precision on an H100: 256 x 128 has three quarters of the traffic of 128 x 128, and half of
    the shuffles for sums over rows that 128 x 256 needs; it leaves no registers for masks. Before
    that, products take their factors from registers, too. Exact float32 runs on ordinary units.
    """
    depth = min(64, max(16, triton.next_power_of_2(x.shape[1])))
    if x.dtype != torch.float32:
        even = len(x) % 256 == 0 and len(y) % 128 == 0 and not masked
        large = even and capability(x.device) >= (9, 0)
        return Blocks(256 if large else 128, 128, depth, 8, 3)
    if precision == "tf32":
        return Blocks(128, 128, min(depth, 32), 8, 3)
    return Blocks(64, 64, 16, 4, 3)


@triton.jit
def column_or_none(index, n):
    """An index as int32, -1 where there is no such column."""
    return tl.where((index >= 0) & (index < n), index, -1).to(tl.int32)


@triton.jit
def within(index, stop, EVEN: tl.constexpr):
    """Which indices are below stop: all of them, without a test, where tiles are even."""
    return (index < stop) | EVEN


@triton.jit
def positives_of(labels, rows, stop, n, EVEN: tl.constexpr):
    """The column of each row's positive, -1 for none."""
    inside = within(rows, stop, EVEN)
    if labels is None:
        index = tl.where(inside, rows, -1)
    else:
        index = tl.load(labels + rows, mask=inside, other=-1)
    return column_or_none(index, n)


@triton.jit
def tile_of(first, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile and indices of this program: row tile, column tile, rows and columns in int64."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(stop - first, ROWS)
    row_tile = (program % row_tiles).to(tl.int64)
    column_tile = (program // row_tiles).to(tl.int64)
    rows = first + row_tile * ROWS + tl.arange(0, ROWS)
    return row_tile, column_tile, rows, column_tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def kept_pairs(
    excluded, own, rows, columns, stop, n, stride_row, stride_column, EVEN: tl.constexpr
):
    """Which pairs of a tile count: inside of the strip, and not left out."""
    kept = within(rows, stop, EVEN)[:, None] & within(columns, n, EVEN)[None, :]
    if excluded is not None:
        at = rows[:, None] * stride_row + columns[None, :] * stride_column
        kept = kept & (tl.load(excluded + at, mask=kept, other=1) == 0)
    if own is not None:
        out = column_or_none(tl.load(own + rows, mask=within(rows, stop, EVEN), other=-1), n)
        kept = kept & (out[:, None] != columns.to(tl.int32)[None, :])
    return kept


@triton.jit
def dots(
    x,
    y,
    rows,
    columns,
    stride_x,
    stride_y,
    width,
    DEPTH: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i·y_j of a tile in float32; rows and columns must lie inside, DEPTH divide the width."""
    inner = tl.arange(0, DEPTH)
    x += rows[:, None] * stride_x + inner[None, :]
    y += columns[None, :] * stride_y + inner[:, None]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for _ in range(0, width, DEPTH):
        left = tl.load(x).to(DOT_TYPE)
        right = tl.load(y).to(DOT_TYPE)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
        x += DEPTH
        y += DEPTH
    return sums


@triton.jit
def quarters(tile):
    """A tile's columns in four pieces, which registers need not all hold at once with results."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def halves(tile):
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))
