"""Gradients of log-sum-exp over the rows and columns of a matrix of logits, and of some logits.

Differs: log-sum-exp comes in two floats, as what remains of a matching pair's gradient is a small
    difference; where those of a tile are less than 2⁸⁰ apart, one exponential serves both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._contrastive._products import Wanted, swept, unit_of, zeros
from lightning_ext.kernels._triton._contrastive._tiles import (
    _LOG2E,
    LN2,
    dots,
    kept_pairs,
    pair,
    positives_of,
    quarters,
    strides_of,
    tile_of,
    within,
)


def logsumexp_grads(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    grad_rows: Tensor,
    grad_columns: Tensor | None,
    grad_positives: Tensor,
    *,
    labels: Tensor | None,
    excluded: Tensor | None,
    own: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return ``functional.block_logsumexp_grads`` in the dtypes wanted, None for one that is not.

    scale and the gradients are float32 and contiguous, excluded is uint8.
    """
    if 0 in (len(x), len(y)):
        return *zeros(x, y, wanted), scale.new_zeros((), dtype=torch.float64)
    found = pair(x, y, masked=excluded is not None)
    unit = unit_of(x.dtype, grad_rows, grad_columns, grad_positives)
    parts = grad_rows.new_empty(found.tiles(len(x))[0] * found.tiles(1)[1])
    sums = *_split(rows), *_split(columns)

    def stage(staged: Tensor, first: int, stop: int) -> None:
        row_tiles, column_tiles = found.tiles(stop - first)
        before = first // found.blocks.rows * column_tiles
        _gradient_kernel[(row_tiles * column_tiles,)](
            found.x, found.y, scale, *sums, grad_rows, grad_columns, grad_positives,
            labels, excluded, own, unit, staged, parts[before:], first, stop, len(y),
            *strides_of(excluded), staged.stride(0), **found.settings,
        )  # fmt: skip

    of_x, of_y = swept(found, stage, scale / unit, wanted=wanted)
    return of_x, of_y, parts.sum(dtype=torch.float64) / unit


def _split(lse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A logarithm to base 2 as a sum of two float32; 0 for -inf, where no logit counts."""
    if lse is None:
        return None, None
    exact = torch.where(lse == float("-inf"), 0.0, lse.double() / LN2)
    high = exact.float()
    return high, (exact - high).float()


@triton.jit(do_not_specialize=("first", "stop", "n"))
def _gradient_kernel(
    x,
    y,
    scale,
    row_high,
    row_low,
    column_high,
    column_low,
    grad_rows,
    grad_columns,
    grad_positives,
    labels,
    excluded,
    own,
    unit,
    staged,
    parts,
    first,
    stop,
    n,
    stride_excluded_row,
    stride_excluded_column,
    stride_staged,
    stride_x,
    stride_y,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of unit·G into `staged`, and Σ unit·G_ij x_i·y_j into parts[program]."""
    _row_tile, column_tile, rows, columns = tile_of(first, stop, ROWS, COLUMNS)
    pieces = quarters(dots(
        x, y, tl.minimum(rows, stop - 1), tl.minimum(columns, n - 1),
        stride_x, stride_y, width, DEPTH, DOT_TYPE, PRECISION,
    ))  # fmt: skip
    factor = tl.load(unit)
    scale2 = tl.load(scale) * _LOG2E
    in_rows = within(rows, stop, EVEN)
    high = tl.load(row_high + rows, mask=in_rows, other=0.0)
    low = tl.load(row_low + rows, mask=in_rows, other=0.0)
    of_rows = tl.load(grad_rows + rows, mask=in_rows, other=0.0) * factor
    of_positives = tl.load(grad_positives + rows, mask=in_rows, other=0.0) * factor
    positive = positives_of(labels, rows, stop, n, EVEN)
    if column_high is None:
        highest = 0.0
        close = False
    else:
        highest, lowest = _range(high, in_rows, column_high, columns, n, EVEN)
        close = highest - lowest < 80
    WIDTH: tl.constexpr = COLUMNS // 4
    columns = column_tile * COLUMNS + tl.arange(0, WIDTH)
    sums = 0.0
    for piece in tl.static_range(4):
        sums += _gradient_piece(
            pieces[piece], rows, columns + piece * WIDTH, scale2, high, low, of_rows, positive,
            of_positives, column_high, column_low, grad_columns, factor, highest, close, excluded,
            own, stride_excluded_row, stride_excluded_column, staged, stride_staged, first, stop, n,
            EVEN,
        )  # fmt: skip
    tl.store(parts + tl.program_id(0), sums)


@triton.jit
def _range(high, in_rows, column_high, columns, n, EVEN: tl.constexpr):
    """Largest and smallest log-sum-exp of a tile's rows and columns."""
    in_columns = within(columns, n, EVEN)
    of_columns = tl.load(column_high + columns, mask=in_columns, other=0.0)
    highest = tl.maximum(
        tl.max(tl.where(in_rows, high, float("-inf"))),
        tl.max(tl.where(in_columns, of_columns, float("-inf"))),
    )
    lowest = tl.minimum(
        tl.min(tl.where(in_rows, high, float("inf"))),
        tl.min(tl.where(in_columns, of_columns, float("inf"))),
    )
    return highest, lowest


@triton.jit
def _gradient_piece(
    product,
    rows,
    columns,
    scale2,
    high,
    low,
    of_rows,
    positive,
    of_positives,
    column_high,
    column_low,
    grad_columns,
    factor,
    highest,
    close,
    excluded,
    own,
    stride_excluded_row,
    stride_excluded_column,
    staged,
    stride_staged,
    first,
    stop,
    n,
    EVEN: tl.constexpr,
):
    """Store some columns of G and return Σ G_ij x_i·y_j over them."""
    in_rows = within(rows, stop, EVEN)
    in_columns = within(columns, n, EVEN)
    kept = kept_pairs(
        excluded, own, rows, columns, stop, n, stride_excluded_row, stride_excluded_column, EVEN
    )
    z = tl.where(kept, product * scale2, float("-inf"))
    if column_high is None:
        gradient = of_rows[:, None] * tl.exp2(z - high[:, None] - low[:, None])
    else:
        of_high = tl.load(column_high + columns, mask=in_columns, other=0.0)
        of_low = tl.load(column_low + columns, mask=in_columns, other=0.0)
        of_columns = tl.load(grad_columns + columns, mask=in_columns, other=0.0) * factor
        if close:
            by_row = of_rows * tl.exp2(tl.where(in_rows, highest - high - low, 0.0))
            by_column = of_columns * tl.exp2(tl.where(in_columns, highest - of_high - of_low, 0.0))
            gradient = tl.exp2(z - highest) * (by_row[:, None] + by_column[None, :])
        else:
            gradient = of_rows[:, None] * tl.exp2(z - high[:, None] - low[:, None])
            gradient += of_columns[None, :] * tl.exp2(z - of_high[None, :] - of_low[None, :])
    hit = positive[:, None] == columns.to(tl.int32)[None, :]
    gradient += tl.where(hit, of_positives[:, None], 0.0)
    to = staged + (rows - first)[:, None] * stride_staged + columns[None, :]
    tl.store(to, gradient.to(staged.dtype.element_ty))
    return tl.sum(gradient * product)
