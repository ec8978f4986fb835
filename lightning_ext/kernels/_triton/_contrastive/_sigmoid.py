"""Sigmoid losses of all pairs of a batch, and their gradients.

Source: Zhai et al. 2023 (SigLIP, arXiv:2303.15343), eq. 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._contrastive._products import Wanted, swept, unit_of, zeros
from lightning_ext.kernels._triton._contrastive._tiles import (
    _LOG2E,
    dots,
    pair,
    partial_strips,
    positives_of,
    quarters,
    tile_of,
    within,
)


def sigmoid_rows(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, labels: Tensor | None
) -> Tensor:
    """Return −Σ_j log σ(±(s x_i·y_j + b)) in float64; scale and bias are float32."""
    out = x.new_zeros(len(x), dtype=torch.float64)
    if 0 in (len(x), len(y)):
        return out
    found = pair(x, y)
    for first, stop in partial_strips(found):
        row_tiles, column_tiles = found.tiles(stop - first)
        parts = out.new_empty(column_tiles, stop - first, dtype=torch.float32)
        _sigmoid_partial_kernel[(row_tiles * column_tiles,)](
            found.x, found.y, scale, bias, labels, parts, first, stop, len(y), **found.settings
        )
        torch.sum(parts, 0, dtype=torch.float64, out=out[first:stop])
    return out


def sigmoid_grads(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    grad_rows: Tensor,
    *,
    labels: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return gradients of Σ_i ∂ℓ_i ℓ_i for x and y, in the dtypes wanted, scale and bias.

    scale, bias and grad_rows are float32 and contiguous.
    """
    if 0 in (len(x), len(y)):
        return (
            *zeros(x, y, wanted),
            torch.zeros_like(scale).double(),
            torch.zeros_like(bias).double(),
        )
    found = pair(x, y)
    unit = unit_of(x.dtype, grad_rows)
    parts = grad_rows.new_empty(2, found.tiles(len(x))[0] * found.tiles(1)[1])

    def stage(staged: Tensor, first: int, stop: int) -> None:
        row_tiles, column_tiles = found.tiles(stop - first)
        before = first // found.blocks.rows * column_tiles
        _sigmoid_gradient_kernel[(row_tiles * column_tiles,)](
            found.x, found.y, scale, bias, labels, grad_rows, unit, staged, parts[0, before:],
            parts[1, before:], first, stop, len(y), staged.stride(0), **found.settings,
        )  # fmt: skip

    of_x, of_y = swept(found, stage, scale / unit, wanted=wanted)
    of_scale, of_bias = parts.sum(1, dtype=torch.float64) / unit
    return of_x, of_y, of_scale, of_bias


@triton.jit
def _log1p(v):
    """log(1 + v) for v in [0, 1] to 2e-7 of itself: a polynomial for log(1 + v) / v."""
    p = -0.00324402114 * v + 0.0198514442
    p = p * v - 0.0569595001
    p = p * v + 0.106036514
    p = p * v - 0.153055905
    p = p * v + 0.196759385
    p = p * v - 0.249541335
    p = p * v + 0.333299624
    p = p * v - 0.499999024
    return v * (p * v + 0.999999995)


@triton.jit(do_not_specialize=("first", "stop", "n"))
def _sigmoid_partial_kernel(
    x,
    y,
    scale,
    bias,
    labels,
    parts,
    first,
    stop,
    n,
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
    """Sums of softplus(∓z) over a tile's columns: parts[column tile, row]."""
    _row_tile, column_tile, rows, columns = tile_of(first, stop, ROWS, COLUMNS)
    pieces = quarters(dots(
        x, y, tl.minimum(rows, stop - 1), tl.minimum(columns, n - 1),
        stride_x, stride_y, width, DEPTH, DOT_TYPE, PRECISION,
    ))  # fmt: skip
    s = tl.load(scale)
    b = tl.load(bias)
    positive = positives_of(labels, rows, stop, n, EVEN)
    WIDTH: tl.constexpr = COLUMNS // 4
    columns = column_tile * COLUMNS + tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS,), tl.float32)
    for piece in tl.static_range(4):
        sums += _softplus_sums(pieces[piece] * s + b, positive, columns + piece * WIDTH, n, EVEN)
    to = parts + column_tile * (stop - first) + (rows - first)
    tl.store(to, sums, mask=within(rows, stop, EVEN))


@triton.jit
def _softplus_sums(z, positive, columns, n, EVEN: tl.constexpr):
    hit = positive[:, None] == columns.to(tl.int32)[None, :]
    z = tl.where(hit, -z, z)
    losses = tl.maximum(z, 0.0) + _log1p(tl.exp2(-tl.abs(z) * _LOG2E))
    return tl.sum(tl.where(within(columns, n, EVEN)[None, :], losses, 0.0), 1)


@triton.jit(do_not_specialize=("first", "stop", "n"))
def _sigmoid_gradient_kernel(
    x,
    y,
    scale,
    bias,
    labels,
    grad_rows,
    unit,
    staged,
    scale_parts,
    bias_parts,
    first,
    stop,
    n,
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
    """A tile of unit·G into `staged`; Σ unit·G_ij x_i·y_j and Σ unit·G_ij into the parts."""
    _row_tile, column_tile, rows, columns = tile_of(first, stop, ROWS, COLUMNS)
    pieces = quarters(dots(
        x, y, tl.minimum(rows, stop - 1), tl.minimum(columns, n - 1),
        stride_x, stride_y, width, DEPTH, DOT_TYPE, PRECISION,
    ))  # fmt: skip
    s = tl.load(scale)
    b = tl.load(bias)
    positive = positives_of(labels, rows, stop, n, EVEN)
    weights = tl.load(grad_rows + rows, mask=within(rows, stop, EVEN), other=0.0) * tl.load(unit)
    to = staged + (rows - first) * stride_staged
    WIDTH: tl.constexpr = COLUMNS // 4
    columns = column_tile * COLUMNS + tl.arange(0, WIDTH)
    by_scale = 0.0
    by_bias = 0.0
    for piece in tl.static_range(4):
        more_by_scale, more_by_bias = _sigmoid_piece(
            pieces[piece], s, b, positive, columns + piece * WIDTH, n, weights, to, EVEN
        )
        by_scale += more_by_scale
        by_bias += more_by_bias
    tl.store(scale_parts + tl.program_id(0), by_scale)
    tl.store(bias_parts + tl.program_id(0), by_bias)


@triton.jit
def _sigmoid_piece(product, s, b, positive, columns, n, weights, to, EVEN: tl.constexpr):
    """Store some columns of G and return Σ G_ij x_i·y_j and Σ G_ij over them."""
    hit = positive[:, None] == columns.to(tl.int32)[None, :]
    z = product * s + b
    small = tl.exp2(-tl.abs(z) * _LOG2E)
    upper = 1.0 / (1.0 + small)
    # σ of what the loss is softplus of: z, or -z of a pair that matches
    gradient = tl.where((z >= 0) ^ hit, upper, small * upper)
    gradient = tl.where(hit, -gradient, gradient) * weights[:, None]
    gradient = tl.where(within(columns, n, EVEN)[None, :], gradient, 0.0)
    tl.store(to[:, None] + columns[None, :], gradient.to(to.dtype.element_ty))
    return tl.sum(gradient * product), tl.sum(gradient)
