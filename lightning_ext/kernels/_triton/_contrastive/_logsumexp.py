"""Log-sum-exp over the rows and columns of a matrix of logits.

Source: Cheng et al. 2024 (Inf-CL, arXiv:2410.17243), which takes rows alone.
Differs: both directions come out of one pass over tiles. Each tile has its own maxima; where one
    for the whole tile leaves every sum above 1e-24, one exponential of each logit serves both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._contrastive._tiles import (
    _LOG2E,
    LN2,
    dots,
    kept_pairs,
    pair,
    partial_strips,
    positives_of,
    quarters,
    strides_of,
    tile_of,
    within,
)

_MERGED = 128  # entries of a program that merges partial results


def logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    labels: Tensor | None,
    excluded: Tensor | None,
    own: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``functional.block_logsumexp``; scale is float32, excluded is uint8."""
    by_row = _nothing(x, len(x))
    by_column = _nothing(x, len(y) if columns else 0)
    positives = torch.zeros_like(by_row[0])
    if 0 in (len(x), len(y)):
        return _natural(by_row), _natural(by_column), positives.double()
    found = pair(x, y, masked=excluded is not None)
    for first, stop in partial_strips(found):
        row_tiles, column_tiles = found.tiles(stop - first)
        row_parts = by_row.new_empty(2, column_tiles, stop - first)
        column_parts = by_row.new_empty(2, row_tiles, len(y)) if columns else None
        parts = (*row_parts, *((None, None) if column_parts is None else column_parts))
        _partial_kernel[(row_tiles * column_tiles,)](
            found.x, found.y, scale, *parts, positives, labels, excluded, own, first, stop, len(y),
            *strides_of(excluded), **found.settings,
            SHARED=columns and excluded is None and own is None,
        )  # fmt: skip
        _merge(row_parts, by_row[:, first:stop])
        if column_parts is not None:
            _merge(column_parts, by_column)
    return _natural(by_row), _natural(by_column), positives.double() * LN2


def _nothing(like: Tensor, size: int) -> Tensor:
    """Largest exponents and sums of none."""
    out = like.new_zeros(2, size, dtype=torch.float32)
    out[0] = float("-inf")
    return out


def _natural(parts: Tensor) -> Tensor:
    """The logarithm of 2^largest Σ, in float64: small losses are differences of large ones."""
    largest, sums = parts.double()
    return (largest + sums.log2()) * LN2


def _merge(parts: Tensor, out: Tensor) -> None:
    """Add the sums of equal columns to those that `out` has, (2, tiles, size) to (2, size)."""
    _, count, size = parts.shape
    _merge_kernel[(triton.cdiv(size, _MERGED),)](
        *parts, *out, count, size, BLOCK=_MERGED, num_warps=4
    )


@triton.jit(do_not_specialize=("first", "stop", "n"))
def _partial_kernel(
    x,
    y,
    scale,
    row_largest,
    row_sums,
    column_largest,
    column_sums,
    positives,
    labels,
    excluded,
    own,
    first,
    stop,
    n,
    stride_excluded_row,
    stride_excluded_column,
    stride_x,
    stride_y,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Largest z and Σ 2^(z - largest) of a tile: rows at [column tile, row], columns likewise."""
    row_tile, column_tile, rows, columns = tile_of(first, stop, ROWS, COLUMNS)
    z = dots(
        x, y, tl.minimum(rows, stop - 1), tl.minimum(columns, n - 1),
        stride_x, stride_y, width, DEPTH, DOT_TYPE, PRECISION,
    )  # fmt: skip
    z *= tl.load(scale) * _LOG2E
    # Out of the same product as the sums: both have the same rounding, which differences lose.
    positive = positives_of(labels, rows, stop, n, EVEN)
    here = (positive >= column_tile * COLUMNS) & (positive < (column_tile + 1) * COLUMNS)
    if tl.max(here.to(tl.int32)) > 0:
        hit = positive[:, None] == columns.to(tl.int32)[None, :]
        tl.store(positives + rows, tl.sum(tl.where(hit, z, 0.0), 1), mask=here)
    at_rows = column_tile * (stop - first) + (rows - first)
    at_columns = row_tile * n
    shared = False
    if SHARED:
        kept = within(rows, stop, EVEN)[:, None] & within(columns, n, EVEN)[None, :]
        masked = tl.where(kept, z, float("-inf"))
        highest = tl.max(masked)
        powers = tl.exp2(masked - highest)
        by_row = tl.sum(powers, 1)
        by_column = tl.sum(powers, 0)
        smallest = tl.minimum(
            tl.min(tl.where(within(rows, stop, EVEN), by_row, 1.0)),
            tl.min(tl.where(within(columns, n, EVEN), by_column, 1.0)),
        )
        shared = smallest >= 1e-24
        if shared:
            tl.store(row_largest + at_rows, highest, mask=within(rows, stop, EVEN))
            tl.store(row_sums + at_rows, by_row, mask=within(rows, stop, EVEN))
            tl.store(column_largest + at_columns + columns, highest, mask=within(columns, n, EVEN))
            tl.store(column_sums + at_columns + columns, by_column, mask=within(columns, n, EVEN))
    if not shared:
        WIDTH: tl.constexpr = COLUMNS // 4
        some_columns = column_tile * COLUMNS + tl.arange(0, WIDTH)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)
        pieces = quarters(z)
        for piece in tl.static_range(4):
            largest, sums = _add_piece(
                largest, sums, pieces[piece], column_largest, column_sums, at_columns, excluded,
                own, rows, some_columns + piece * WIDTH, stop, n, stride_excluded_row,
                stride_excluded_column, EVEN,
            )  # fmt: skip
        tl.store(row_largest + at_rows, largest, mask=within(rows, stop, EVEN))
        tl.store(row_sums + at_rows, sums, mask=within(rows, stop, EVEN))


@triton.jit
def _add_piece(
    largest,
    sums,
    z,
    column_largest,
    column_sums,
    at_columns,
    excluded,
    own,
    rows,
    columns,
    stop,
    n,
    stride_excluded_row,
    stride_excluded_column,
    EVEN: tl.constexpr,
):
    """Add some columns to the sums of rows, and store their own."""
    kept = kept_pairs(
        excluded, own, rows, columns, stop, n, stride_excluded_row, stride_excluded_column, EVEN
    )
    z = tl.where(kept, z, float("-inf"))
    if column_sums is not None:
        of_column, by_column = _scaled_sums(z, 0)
        tl.store(column_largest + at_columns + columns, of_column, mask=within(columns, n, EVEN))
        tl.store(column_sums + at_columns + columns, by_column, mask=within(columns, n, EVEN))
    of_row, by_row = _scaled_sums(z, 1)
    return _merged(largest, sums, of_row, by_row)


@triton.jit
def _merged(largest, sums, other_largest, other_sums):
    """The sums of both."""
    larger = tl.maximum(largest, other_largest)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, sums * tl.exp2(largest - base) + other_sums * tl.exp2(other_largest - base)


@triton.jit
def _scaled_sums(z, AXIS: tl.constexpr):
    """The largest z along an axis and Σ 2^(z - largest); -inf and 0 where there is nothing."""
    largest = tl.max(z, AXIS)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp2(z - tl.expand_dims(base, AXIS)), AXIS)


@triton.jit(do_not_specialize=("count", "size"))
def _merge_kernel(part_largest, part_sums, out_largest, out_sums, count, size, BLOCK: tl.constexpr):
    """Add `count` rows of sums to out, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    largest = tl.load(out_largest + at, mask=inside, other=0.0)
    sums = tl.load(out_sums + at, mask=inside, other=0.0)
    for _ in range(0, count):
        part = tl.load(part_largest + at, mask=inside, other=0.0)
        part_sum = tl.load(part_sums + at, mask=inside, other=0.0)
        largest, sums = _merged(largest, sums, part, part_sum)
        part_largest += size
        part_sums += size
    tl.store(out_largest + at, largest, mask=inside)
    tl.store(out_sums + at, sums, mask=inside)
