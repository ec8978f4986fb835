"""Products with a gradient in the logits of which a strip of rows is staged.

Source: peers compute the logits once for the gradient of x and once for that of y, as
    FlashAttention's backward pass does, and keep the result, rows x width in float32, in registers.
Differs: at the widths of embeddings that result fills the registers of a multiprocessor, and with
    the forward pass there are 10 b² d operations. With the gradient staged, logits are computed
    once, 8 b² d; all three products are plain ones with tiles of the same size at any width. The
    price is 6 bytes of traffic for each logit, which matters at widths below 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._contrastive._tiles import Blocks, Pair, strips
from lightning_ext.kernels._triton._interpret import capability

Wanted = tuple[torch.dtype | None, torch.dtype | None]

_STAGED_BYTES = 256 << 20  # of a strip of gradients: 2,048 rows at 65,536 columns of two bytes
_PROGRAMS = 128  # that a product is split into; an H100 has 132 multiprocessors, an A100 108
_STEPS = 16  # of a product's loop, before splitting it pays


def staged_rows(found: Pair) -> int:
    """Rows of a strip of which gradients are staged, before the last one."""
    block = found.blocks.rows
    row_bytes = found.tiles(1)[1] * found.blocks.columns * found.x.element_size()
    most = max(1, _STAGED_BYTES // row_bytes // block)
    return block * min(most, triton.cdiv(len(found.x), block))


def swept(
    found: Pair,
    stage: Callable[[Tensor, int, int], None],
    factor: Tensor,
    *,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None]:
    """Return factor G y and factor Gᵀ x, where ``stage`` writes a strip of G.

    Args:
        found: x, shape (m, d), and y, shape (n, d), neither of them empty.
        stage: called with the strip's memory, rows and columns padded to whole tiles, its first row
            and the row behind its last one; writes all of it, zeros where there is no logit.
        factor: shape ().
        wanted: dtypes of the two results, None for one that is not wanted.
    """
    rows = staged_rows(found)
    columns = found.tiles(1)[1] * found.blocks.columns
    staged = found.x.new_empty(rows, columns)
    of_x = _result(found.x, found.width, wanted[0])
    sums = (
        None
        if wanted[1] is None
        else staged.new_empty(columns, found.x.shape[1], dtype=torch.float32)
    )
    for first, stop in strips(len(found.x), found.blocks.rows, rows):
        strip = staged[: found.tiles(stop - first)[0] * found.blocks.rows]
        stage(strip, first, stop)
        if of_x is not None:
            part = _product(strip, found.y, found, splittable=True)
            torch.mul(part[: stop - first, : found.width], factor, out=of_x[first:stop])
        if sums is not None:
            rows_of_x = found.x[first:stop]
            _product(strip.T, rows_of_x, found, out=sums, accumulate=first > 0)
    if sums is None:
        return of_x, None
    del staged, strip
    of_y = sums[: len(found.y), : found.width].mul_(factor)
    return of_x, of_y.to(wanted[1], memory_format=torch.contiguous_format)


def zeros(x: Tensor, y: Tensor, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of nothing."""
    of_x, of_y = wanted
    return (
        None if of_x is None else torch.zeros_like(x, dtype=of_x),
        None if of_y is None else torch.zeros_like(y, dtype=of_y),
    )


def unit_of(dtype: torch.dtype, *grads: Tensor | None) -> Tensor:
    """Return what staged gradients are multiplied by, so that float16 keeps those of a mean."""
    if dtype != torch.float16:
        return torch.ones((), device=next(g.device for g in grads if g is not None))
    largest = torch.stack([g.abs().amax() for g in grads if g is not None]).amax()
    return torch.where(largest > 0, 8192 / largest, 1.0)


def _result(x: Tensor, width: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else x.new_empty(len(x), width, dtype=dtype)


def _product_blocks(found: Pair) -> Blocks:
    """Blocks of a product with a staged strip; all of them divide what it is given."""
    width, dtype = found.x.shape[1], found.x.dtype
    exact = dtype == torch.float32 and found.settings["PRECISION"] == "ieee"
    modern = dtype != torch.float32 and capability(found.x.device) >= (9, 0)
    largest = 64 if exact else 256 if modern else 128
    columns = next(c for c in (256, 128, 64, 32, 16) if c <= largest and width % c == 0)
    if exact:
        return Blocks(64, columns, 16, 4, 2)
    return Blocks(128, columns, 32 if dtype == torch.float32 else 64, 8, 3)


def _product(
    staged: Tensor,
    factors: Tensor,
    found: Pair,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    splittable: bool = False,
) -> Tensor:
    """A staged strip, or its transpose, times rows of x or y; zeros in the strip meet no rows."""
    blocks = _product_blocks(found)
    rows, depth = staged.shape
    width = factors.shape[1]
    transposed = staged.stride(0) == 1
    tiles = rows // blocks.rows * (width // blocks.columns)
    steps = depth // blocks.depth
    splits = max(1, min(_PROGRAMS // tiles, steps // _STEPS)) if splittable else 1
    if out is None:
        out = staged.new_empty(splits, rows, width, dtype=torch.float32)
    _product_kernel[(tiles * splits,)](
        staged,
        factors,
        out,
        rows,
        width,
        triton.cdiv(steps, splits),
        depth,
        len(factors),
        staged.stride(1 if transposed else 0),
        factors.stride(0),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        TRANSPOSED=transposed,
        ACCUMULATE=accumulate,
        DOT_TYPE=found.settings["DOT_TYPE"],
        PRECISION=found.settings["PRECISION"],
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if out.ndim == 2:
        return out
    return out[0] if splits == 1 else out.sum(0)


@triton.jit(do_not_specialize=("steps", "factor_rows"))
def _product_kernel(
    staged,
    factors,
    out,
    rows,
    width,
    steps,
    depth,
    factor_rows,
    stride_staged,
    stride_factors,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split] (+)= staged @ factors over the steps of a split; blocks divide rows and width."""
    program = tl.program_id(0)
    column_tiles = width // COLUMNS
    tiles = column_tiles * (rows // ROWS)
    split = (program // tiles).to(tl.int64)
    tile = program % tiles
    row = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    start = (split * steps * DEPTH).to(tl.int32)
    stop = tl.minimum(start + steps * DEPTH, depth)
    for first in range(start, stop, DEPTH):
        inner = first + tl.arange(0, DEPTH).to(tl.int64)
        if TRANSPOSED:
            left = tl.load(staged + row[:, None] + inner[None, :] * stride_staged)
        else:
            left = tl.load(staged + row[:, None] * stride_staged + inner[None, :])
        # Rows behind the last one are multiplied by zeros.
        inner = tl.minimum(inner, factor_rows - 1)
        right = tl.load(factors + inner[:, None] * stride_factors + column[None, :])
        sums = tl.dot(left.to(DOT_TYPE), right.to(DOT_TYPE), sums, input_precision=PRECISION)
    to = out + (split * rows + row[:, None]) * width + column[None, :]
    if ACCUMULATE:
        sums += tl.load(to)
    tl.store(to, sums)
