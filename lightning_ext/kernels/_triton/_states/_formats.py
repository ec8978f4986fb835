"""Optimizer states inside a kernel: read as float32 and written in the format that keeps them.

A launch that works on states has, for each list of them, the columns that ``state_columns`` makes.
FORMAT names what they are: "tensor" (float32, bfloat16 or float16, by the engine's DTYPE),
"bfloat16" (rounded at random), "int8_signed", "int8_unsigned", "int4_signed", "int4_rank1", "fp8".
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_ext.functional._states._codes import POWER_MAX, POWER_STEP, RANGE, SMALLEST, TOP
from lightning_ext.kernels._triton._multi_tensor import address, load, store
from lightning_ext.kernels._triton._quantization._random import random_bits
from lightning_ext.kernels._triton._quantization._round_stochastic import round_to_bfloat16

# Where things stand in the bytes of `code_books`: what the upper 16 bits of a number lead to, then
# the numbers of each book and what is halfway between them, then the logarithms of E4M3.
FIRSTS = tl.constexpr(1 << 16)
NUMBERS = tl.constexpr(3 << 16)
LOGARITHMS = tl.constexpr((3 << 16) + 6 * 1024)

SMALLEST_SCALE = tl.constexpr(SMALLEST)
_RANGE_STEPS = tl.constexpr(RANGE / POWER_STEP)
_OCTAVES_MIN = tl.constexpr(RANGE / POWER_MAX)
_POWER_STEP = tl.constexpr(POWER_STEP)
_TOP = tl.constexpr(TOP)


@triton.jit
def state_addresses(table, count, column, tensor, FORMAT: tl.constexpr):
    """Addresses of a tensor's codes, scales and width; column: the first of those of its list."""
    codes = address(table, count, column, tensor)
    scales = codes
    width = codes
    if FORMAT != "tensor" and FORMAT != "bfloat16":
        scales = address(table, count, column + 1, tensor)
    if FORMAT == "int4_rank1":
        width = address(table, count, column + 2, tensor)
    return codes, scales, width


@triton.jit
def new_scales(table, count, column, tensor, FORMAT: tl.constexpr):
    """The address of the scales to write with: the same ones, or those of ``rank_one_maxima``."""
    found = address(table, count, column, tensor)
    if FORMAT == "int4_rank1":
        found = address(table, count, column + 3, tensor)
    elif FORMAT != "tensor" and FORMAT != "bfloat16":
        found = address(table, count, column + 1, tensor)
    return found


@triton.jit
def load_state(
    codes,
    scales,
    width,
    books,
    code,
    start,
    size,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entries of a state from ``start`` on, float32[BLOCK]; behind its end they mean nothing.

    codes, scales, width: of ``state_addresses``. books: what ``code_books`` returns. code: of the
    dtype, for "tensor" alone. start: int64, a multiple of BLOCK, which is one of 256.
    """
    offsets = start + tl.arange(0, BLOCK)
    if FORMAT == "tensor":
        return load(codes, code, offsets, size, DTYPE, ALIGNED, MASKED)
    elif FORMAT == "bfloat16":
        return load(codes, 1, offsets, size, tl.bfloat16, ALIGNED, MASKED)
    elif FORMAT == "int4_rank1":
        found = _load_codes(codes, start, size, True, ALIGNED, MASKED, BLOCK)
        scale = _rank_one(scales, width, start, size, MASKED, BLOCK)
        return (found + 1).to(tl.float32) * 0.0625 * scale
    elif FORMAT == "fp8":
        found = _load_codes(codes, start, size, False, ALIGNED, MASKED, BLOCK)
        logarithms = _numbers(books + LOGARITHMS, found)
        most, power = _load_pairs(scales, start, size, MASKED, BLOCK)
        exponent = logarithms.reshape(BLOCK // 128, 128) * _reciprocal(power)[:, None]
        x = (tl.exp2(exponent) * most[:, None]).reshape(BLOCK)
        return x * (1 - (found >> 7) * 2).to(tl.float32)
    else:
        PACKED: tl.constexpr = FORMAT == "int4_signed"
        WIDTH: tl.constexpr = 128 if PACKED else 256
        BOOK: tl.constexpr = 2 if PACKED else (1 if FORMAT == "int8_unsigned" else 0)
        found = _load_codes(codes, start, size, PACKED, ALIGNED, MASKED, BLOCK)
        numbers = _numbers(books + (NUMBERS + BOOK * 2048), found)
        scale = _load_scales(scales, start, size, WIDTH, MASKED, BLOCK)
        return (numbers.reshape(BLOCK // WIDTH, WIDTH) * scale[:, None]).reshape(BLOCK)


@triton.jit
def store_state(
    codes,
    scales,
    width,
    books,
    code,
    start,
    size,
    value,
    seed,
    step,
    stream,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write entries of a state; the arguments of ``load_state``, and value, float32[BLOCK].

    scales: of ``new_scales``. seed, step, stream: of the bits that "bfloat16" is rounded by.
    """
    offsets = start + tl.arange(0, BLOCK)
    if FORMAT == "tensor":
        store(codes, code, offsets, size, value, DTYPE, ALIGNED, MASKED)
    elif FORMAT == "bfloat16":
        rounded = round_to_bfloat16(value, random_bits(seed, step, stream, start, BLOCK))
        _store_codes(codes, offsets, size, rounded, tl.int16, ALIGNED, MASKED)
    else:
        if MASKED:
            value = tl.where(offsets < size, value, 0.0)
        if FORMAT == "int4_rank1":
            scale = _rank_one(scales, width, start, size, MASKED, BLOCK)
            share = tl.div_rn(value, tl.where(scale == 0, 1.0, scale))
            found = tl.ceil(tl.minimum(tl.maximum(share * 16 - 1.5, 0.0), 15.0)).to(tl.int32)
        elif FORMAT == "fp8":
            found = _encode_expanded(scales, start, size, value, MASKED, BLOCK)
        else:
            PACKED: tl.constexpr = FORMAT == "int4_signed"
            WIDTH: tl.constexpr = 128 if PACKED else 256
            BOOK: tl.constexpr = 2 if PACKED else (1 if FORMAT == "int8_unsigned" else 0)
            most = _largest(value.reshape(BLOCK // WIDTH, WIDTH))
            _store_scales(scales, start, size, most, WIDTH, MASKED, BLOCK)
            rows = value.reshape(BLOCK // WIDTH, WIDTH) * _inverse(most)[:, None]
            found = _nearest(books, rows.reshape(BLOCK), BOOK)
            if FORMAT == "int8_unsigned":
                found = tl.where((found == 0) & (rows.reshape(BLOCK) > 0), 1, found)
        if FORMAT == "int4_rank1" or FORMAT == "int4_signed":
            if MASKED:
                found = tl.where(offsets < size, found, 0)
            low, high = tl.split(found.reshape(BLOCK // 2, 2))
            half = start // 2 + tl.arange(0, BLOCK // 2)
            _store_codes(codes, half, (size + 1) // 2, low | high << 4, tl.uint8, ALIGNED, MASKED)
        else:
            _store_codes(codes, offsets, size, found, tl.uint8, ALIGNED, MASKED)


@triton.jit
def _numbers(table, codes):
    return tl.load(table.to(tl.pointer_type(tl.float32)) + codes)


@triton.jit
def _nearest(books, x, BOOK: tl.constexpr):
    """The code of the nearest number: of the least one with the same upper bits, or the next."""
    upper = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    first = tl.load(books + BOOK * FIRSTS + upper).to(tl.int32)
    middle = _numbers(books + (NUMBERS + BOOK * 2048 + 1024), first)
    return first + (x > middle).to(tl.int32)


@triton.jit
def _encode_expanded(scales, start, size, value, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    rows = value.reshape(BLOCK // 128, 128)
    magnitude = tl.abs(rows)
    most = _largest(rows)
    least = tl.min(tl.where(magnitude == 0, float("inf"), magnitude), axis=1)
    safe = tl.where(most > 0, most, 1.0)
    octaves = tl.log2(tl.div_rn(safe, tl.where(most > 0, least, 1.0)))
    steps = tl.floor(_reciprocal(tl.maximum(octaves, _OCTAVES_MIN), _RANGE_STEPS))
    power = tl.where(most > 0, tl.maximum(steps, 1.0) * _POWER_STEP, 1.0)
    group = start // 128 + tl.arange(0, BLOCK // 128)
    pointer = scales.to(tl.pointer_type(tl.float32)) + 2 * group
    if MASKED:
        tl.store(pointer, most, mask=group * 128 < size)
        tl.store(pointer + 1, power, mask=group * 128 < size)
    else:
        tl.store(pointer, most)
        tl.store(pointer + 1, power)
    share = magnitude * _inverse(most)[:, None]
    stretched = tl.exp2(tl.log2(tl.where(share > 0, share, 1.0)) * power[:, None]) * _TOP
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return _e4m3(tl.where(share > 0, stretched, 0.0).reshape(BLOCK)) | sign


@triton.jit
def _e4m3(x):
    """The code of E4M3 nearest to x in [0, 448], ties to even, int32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Added to 2¹⁴, the last bit of which is 2⁻⁹, x is rounded to a multiple of E4M3's least number.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def _largest(rows):
    """Scales of rows: max |x|, infinite where there is a nan, 0 where it is no normal number."""
    found = tl.max(tl.where(rows == rows, tl.abs(rows), float("inf")), axis=1)
    return tl.where(found < SMALLEST_SCALE, 0.0, found)


@triton.jit
def _reciprocal(x, NUMERATOR: tl.constexpr = 1.0):
    return tl.div_rn(tl.full(x.shape, NUMERATOR, tl.float32), x)


@triton.jit
def _inverse(scale):
    return tl.where(scale > 0, _reciprocal(tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def _load_codes(
    codes,
    start,
    size,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pointer = codes.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    COUNT: tl.constexpr = BLOCK // 2 if PACKED else BLOCK
    offsets = (start // 2 if PACKED else start) + tl.arange(0, COUNT)
    if MASKED:
        inside = offsets < ((size + 1) // 2 if PACKED else size)
        found = tl.load(pointer + offsets, mask=inside, other=0).to(tl.int32)
    else:
        found = tl.load(pointer + offsets).to(tl.int32)
    if PACKED:
        found = tl.join(found & 15, found >> 4).reshape(BLOCK)
    return found


@triton.jit
def _store_codes(
    codes, offsets, size, found, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):
    pointer = codes.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        tl.store(pointer + offsets, found.to(DTYPE), mask=offsets < size)
    else:
        tl.store(pointer + offsets, found.to(DTYPE))


@triton.jit
def _load_scales(
    scales, start, size, WIDTH: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    block = start // WIDTH + tl.arange(0, BLOCK // WIDTH)
    pointer = scales.to(tl.pointer_type(tl.float32)) + block
    if MASKED:
        return tl.load(pointer, mask=block * WIDTH < size, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def _load_pairs(scales, start, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    group = start // 128 + tl.arange(0, BLOCK // 128)
    pointer = scales.to(tl.pointer_type(tl.float32)) + 2 * group
    if MASKED:
        inside = group * 128 < size
        return tl.load(pointer, mask=inside, other=0), tl.load(pointer + 1, mask=inside, other=1)
    else:
        return tl.load(pointer), tl.load(pointer + 1)


@triton.jit
def _store_scales(
    scales, start, size, most, WIDTH: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    block = start // WIDTH + tl.arange(0, BLOCK // WIDTH)
    pointer = scales.to(tl.pointer_type(tl.float32)) + block
    if MASKED:
        tl.store(pointer, most, mask=block * WIDTH < size)
    else:
        tl.store(pointer, most)


@triton.jit
def _rank_one(scales, width, start, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """min(row's maximum, column's maximum) of the entries from ``start`` on."""
    width = tl.load(width.to(tl.pointer_type(tl.int64)))
    first_row, first_column = start // width, start % width
    lane = tl.arange(0, BLOCK)
    # Behind the end of the first row; BLOCK stands for what is longer. Half an entry off, no
    # rounding takes the quotient over an integer.
    behind = lane - tl.minimum(width - first_column, BLOCK).to(tl.int32)
    narrow = tl.minimum(width, BLOCK).to(tl.int32)
    more = ((behind.to(tl.float32) + 0.5) * (1.0 / narrow.to(tl.float32))).to(tl.int32)
    down = tl.where(behind < 0, 0, 1 + more)
    across = tl.where(behind < 0, first_column + lane, (behind - more * narrow).to(tl.int64))
    pointer = scales.to(tl.pointer_type(tl.float32))
    rows = (size + width - 1) // width
    if MASKED:
        inside = start + lane < size
        row = tl.load(pointer + first_row + down, mask=inside, other=0)
        column = tl.load(pointer + rows + across, mask=inside, other=0)
    else:
        row = tl.load(pointer + first_row + down)
        column = tl.load(pointer + rows + across)
    return tl.minimum(row, column)
