"""Muon's iteration with products of which half is computed: X Xᵀ and b A + c A² are symmetric.

A program makes one tile on or below the diagonal and writes it to its mirror image as well, so that
T(T + 1)/2 tiles do for T rows of tiles. The product that is left, B X, is cuBLAS's.

Differs: the results are symmetric to the bit, tiles on the diagonal included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._newton_schulz import fused_product, starting_point
from lightning_ext.kernels._triton._interpret import INTERPRETED

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Blocks(NamedTuple):
    """Sizes of a launch.

    Attributes:
        side: rows and columns of a tile of the result.
        depth: entries of the summed dimension that are loaded at once.
        warps: of a program.
        stages: of its pipeline of loads.
    """

    side: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _tile_of(program):
    """Row and column of the tiles of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * program.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: the row is right or beside the right one.
    row = tl.where(row * (row + 1) // 2 > program, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= program, row + 1, row)
    return row, program - row * (row + 1) // 2


@triton.jit
def symmetric_product_kernel(
    x,
    a,
    out,
    size,
    width,
    tiles,
    alpha,
    beta,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_A: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Out = alpha x xᵀ + beta a of one matrix of (matrices, size, width), a tile of it.

    One axis for the tiles of all matrices: the others end at 65,535 programs.
    """
    row, column = _tile_of(tl.program_id(0) % tiles)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    first, second = row.to(tl.int64) * BLOCK, column.to(tl.int64) * BLOCK
    # From here on 32 bits do, and half the registers.
    rows, columns, depth = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    # What the last row stands in for, behind it, is not written.
    top = tl.minimum(rows, (size - first - 1).to(tl.int32))[:, None] * width + depth[None, :]
    left = tl.minimum(columns, (size - second - 1).to(tl.int32))[None, :] * width + depth[:, None]
    x += matrix * size * width
    above, aside = x + first * width, x + second * width
    found = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            here, there = tl.load(above + top), tl.load(aside + left)
        else:
            summed = start + depth < width
            here = tl.load(above + top, mask=summed[None, :], other=0)
            there = tl.load(aside + left, mask=summed[:, None], other=0)
        here, there = here.to(DOT_TYPE), there.to(DOT_TYPE)
        found = tl.dot(here, there, found, input_precision=PRECISION)
        above += DEPTH
        aside += DEPTH
    found *= alpha
    inside = (first + rows < size)[:, None] & (second + columns < size)[None, :]
    target = rows[:, None] * size + columns[None, :]
    mirrored = columns[:, None] * size + rows[None, :]
    matrix *= size
    below, beyond = (matrix + first) * size + second, (matrix + second) * size + first
    if HAS_A:
        found += beta * tl.load(a + below + target, mask=inside, other=0).to(tl.float32)
    found = found.to(out.dtype.element_ty)
    if row == column:
        lower = inside & (rows[:, None] >= columns[None, :])
        tl.store(out + below + target, found, mask=lower)
        tl.store(out + beyond + mirrored, tl.trans(found), mask=tl.trans(lower))
    else:
        # A mask that changes within 16 bytes would split the stores.
        tl.store(out + below + target, found, mask=inside)
        tl.store(out + beyond + mirrored, tl.trans(found), mask=tl.trans(inside))


def symmetric_product(
    x: Tensor, *, a: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Return alpha x xᵀ + beta a for a stack of matrices, a symmetric.

    Args:
        x: shape (k, m, n), contiguous.
        a: shape (k, m, m), contiguous; 0 where ``None``.
        alpha: factor of the product.
        beta: factor of a.
    """
    count, size, width = x.shape
    out = x.new_empty(count, size, size)
    block = _blocks(x.dtype, size)
    side = triton.cdiv(size, block.side)
    tiles = side * (side + 1) // 2
    if out.numel() == 0:
        return out
    symmetric_product_kernel[(count * tiles,)](
        x,
        x if a is None else a,
        out,
        size,
        width,
        tiles,
        float(alpha),
        float(beta),
        BLOCK=block.side,
        DEPTH=block.depth,
        EVEN=width % block.depth == 0,
        HAS_A=a is not None,
        # Products of bfloat16 are wrong in the interpreter.
        DOT_TYPE=tl.float32 if INTERPRETED else _TYPES[x.dtype],
        PRECISION=_precision(x.dtype),
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return out


def _blocks(dtype: torch.dtype, size: int) -> _Blocks:
    """Two tiles of factors a stage, at most 128 KiB of shared memory, which sm_80 has as well."""
    if dtype == torch.float32:
        return _Blocks(64, 32, 4, 3) if size > 64 else _Blocks(32, 32, 4, 3)
    if size <= 512:
        return _Blocks(64, 64, 4, 4)
    return _Blocks(128, 64, 8, 4)


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: exactly, unless torch was told to use TF32 in its own products."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def newton_schulz(
    x: Tensor,
    *,
    steps: int,
    coefficients: tuple[float, float, float],
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Launch the products; arguments as in ``functional.newton_schulz``, checked by the caller."""
    a, b, c = coefficients
    start = starting_point(x, eps, dtype)
    found = _padded(start if start.ndim == 3 else start[None])
    for _ in range(steps):
        gram = symmetric_product(found)
        change = symmetric_product(gram, a=gram, alpha=c, beta=b)
        found = fused_product(found, change, found, beta=a, alpha=1)
    found = found[:, : start.shape[-2], : start.shape[-1]]
    return (found.mT if x.shape[-2] > x.shape[-1] else found).to(x.dtype).reshape(x.shape)


def _padded(x: Tensor) -> Tensor:
    """Sizes that are multiples of 16, for wide loads: zeros remain zeros in every product."""
    size, width = x.shape[-2:]
    if size % 16 == 0 == width % 16:
        return x.contiguous()
    return torch.nn.functional.pad(x, (0, -width % 16, 0, -size % 16))
