"""Block quantization, what is read back, and both around a sum over ranks, in one launch each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._quantization._formats import FORMATS
from lightning_ext.functional._quantization._quantized import Quantized
from lightning_ext.kernels._triton._quantization._code_tiles import (
    is_whole,
    load_tile,
    places,
    read_tile,
    reduce_tile,
    store_tile,
    write_tile,
)

_TILE = 2048  # entries of a program
# One program for any step: nothing is to be compiled for those that are 1 or a multiple of 16.
_COUNTER = ["seed", "step", "stream"]


@triton.jit(do_not_specialize=_COUNTER)
def quantize_kernel(
    x,
    codes,
    scales,
    shifts,
    length,
    blocks,
    code_length,
    per_row,
    seed,
    step,
    stream,
    FORMAT: tl.constexpr,
    SHIFTED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FLAT: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * G
    whole = is_whole(first, length, FLAT, G, B)
    offsets, inside = places(first, blocks, length, per_row, FLAT, G, B)
    values = load_tile(x, offsets, inside, whole).to(tl.float32)
    put, plan, bits = (codes, scales, shifts), (blocks, code_length, per_row), (seed, step, stream)
    write_tile(
        values, inside, whole, first, put, plan, bits, FORMAT, SHIFTED, STOCHASTIC, FLAT, G, B
    )


@triton.jit
def dequantize_kernel(
    out,
    codes,
    scales,
    shifts,
    code_stride,
    scale_stride,
    length,
    blocks,
    code_length,
    per_row,
    factor,
    RANKS: tl.constexpr,
    FORMAT: tl.constexpr,
    SHIFTED: tl.constexpr,
    FLAT: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * G
    whole = is_whole(first, length, FLAT, G, B)
    put, plan = (codes, scales, shifts), (blocks, code_length, per_row)
    if RANKS == 0:
        x = read_tile(whole, first, put, plan, FORMAT, SHIFTED, FLAT, G, B)
    else:
        strides = (code_stride, scale_stride)
        x = reduce_tile(
            whole, first, put, strides, plan, factor, RANKS, FORMAT, SHIFTED, FLAT, G, B
        )
    offsets, inside = places(first, blocks, length, per_row, FLAT, G, B)
    store_tile(out, offsets, x.to(out.dtype.element_ty), inside, whole)


@triton.jit(do_not_specialize=_COUNTER)
def requantize_kernel(
    codes,
    scales,
    shifts,
    new_codes,
    new_scales,
    new_shifts,
    code_stride,
    scale_stride,
    length,
    blocks,
    code_length,
    new_code_length,
    per_row,
    factor,
    seed,
    step,
    stream,
    RANKS: tl.constexpr,
    FORMAT: tl.constexpr,
    SHIFTED: tl.constexpr,
    NEW_FORMAT: tl.constexpr,
    NEW_SHIFTED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FLAT: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * G
    whole = is_whole(first, length, FLAT, G, B)
    put, plan, strides = (
        (codes, scales, shifts),
        (blocks, code_length, per_row),
        (code_stride, scale_stride),
    )
    x = reduce_tile(whole, first, put, strides, plan, factor, RANKS, FORMAT, SHIFTED, FLAT, G, B)
    _, inside = places(first, blocks, length, per_row, FLAT, G, B)
    put, plan = (new_codes, new_scales, new_shifts), (blocks, new_code_length, per_row)
    bits = (seed, step, stream)
    write_tile(
        x, inside, whole, first, put, plan, bits, NEW_FORMAT, NEW_SHIFTED, STOCHASTIC, FLAT, G, B
    )


class _Plan(NamedTuple):
    """The blocks of some rows, and the launch that they take."""

    rows: int
    length: int
    size: int

    @property
    def per_row(self) -> int:
        return -(-self.length // self.size)

    @property
    def flat(self) -> bool:
        return self.rows == 1 or self.length % self.size == 0

    @property
    def group(self) -> int:
        return max(1, _TILE // self.size)

    @property
    def blocks(self) -> int:
        return self.rows * self.per_row

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.blocks, self.group),)

    def along(self, length: int) -> int:
        """What bounds offsets: the length of a row, of all of them where they are flat."""
        return self.rows * length if self.flat else length


def _empty(rows: tuple[int, ...], plan: _Plan, name: str, shifted: bool, like: Tensor) -> Quantized:
    """Room for codes, scales and shifts."""
    kind = FORMATS[name]
    width = plan.length if kind.bits == 8 else -(-plan.length // 2)
    codes = torch.empty((*rows, width), dtype=torch.uint8, device=like.device)
    dtype = torch.uint8 if kind.shared_exponent else torch.float32
    scales = torch.empty((*rows, plan.per_row), dtype=dtype, device=like.device)
    shifts = torch.empty_like(scales) if shifted else None
    return Quantized(codes, scales, shifts, name, plan.size, plan.length)


def _pointers(found: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    return found.codes, found.scales, found.scales if found.shifts is None else found.shifts


def quantize(
    x: Tensor, format: str, size: int, symmetric: bool, seed: int | None, step: int, stream: int
) -> Quantized:
    """Launch ``quantize_kernel``; arguments as in ``functional.quantize``, which were checked."""
    rows = x.shape[:-1]
    plan = _Plan(rows.numel(), x.shape[-1], size)
    out = _empty(rows, plan, format, not symmetric, x)
    if plan.blocks:
        quantize_kernel[plan.grid](
            x.contiguous(),
            *_pointers(out),
            plan.along(plan.length),
            plan.blocks,
            plan.along(out.codes.shape[-1]),
            plan.per_row,
            seed or 0,
            step,
            stream,
            FORMAT=FORMATS[format],
            SHIFTED=not symmetric,
            STOCHASTIC=seed is not None,
            FLAT=plan.flat,
            G=plan.group,
            B=size,
            num_warps=4,
        )
    return out


def dequantize(found: Quantized, *, ranks: int, factor: float, dtype: torch.dtype) -> Tensor:
    """Launch ``dequantize_kernel``; with ``ranks`` it sums over a first axis, times ``factor``."""
    found = _contiguous(found)
    rows = found.shape[1:-1] if ranks else found.shape[:-1]
    plan = _Plan(rows.numel(), found.length, found.block_size)
    out = torch.empty((*rows, plan.length), dtype=dtype, device=found.codes.device)
    if plan.blocks:
        dequantize_kernel[plan.grid](
            out,
            *_pointers(found),
            found.codes.stride(0),
            found.scales.stride(0),
            plan.along(plan.length),
            plan.blocks,
            plan.along(found.codes.shape[-1]),
            plan.per_row,
            factor,
            RANKS=ranks,
            FORMAT=FORMATS[found.format],
            SHIFTED=found.shifts is not None,
            FLAT=plan.flat,
            G=plan.group,
            B=plan.size,
            num_warps=4,
        )
    return out


def requantize(
    found: Quantized,
    format: str,
    symmetric: bool,
    *,
    factor: float,
    seed: int | None,
    step: int,
    stream: int,
) -> Quantized:
    """Launch ``requantize_kernel``: sum over the first axis, times ``factor``, quantized again."""
    found = _contiguous(found)
    rows = found.shape[1:-1]
    plan = _Plan(rows.numel(), found.length, found.block_size)
    out = _empty(rows, plan, format, not symmetric, found.codes)
    if plan.blocks:
        requantize_kernel[plan.grid](
            *_pointers(found),
            *_pointers(out),
            found.codes.stride(0),
            found.scales.stride(0),
            plan.along(plan.length),
            plan.blocks,
            plan.along(found.codes.shape[-1]),
            plan.along(out.codes.shape[-1]),
            plan.per_row,
            factor,
            seed or 0,
            step,
            stream,
            RANKS=len(found.codes),
            FORMAT=FORMATS[found.format],
            SHIFTED=found.shifts is not None,
            NEW_FORMAT=FORMATS[format],
            NEW_SHIFTED=not symmetric,
            STOCHASTIC=seed is not None,
            FLAT=plan.flat,
            G=plan.group,
            B=plan.size,
            num_warps=4,
        )
    return out


def _contiguous(found: Quantized) -> Quantized:
    shifts = None if found.shifts is None else found.shifts.contiguous()
    return found._replace(
        codes=found.codes.contiguous(), scales=found.scales.contiguous(), shifts=shifts
    )
