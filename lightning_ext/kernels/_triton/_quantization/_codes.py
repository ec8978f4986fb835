"""Codes of block quantization inside a kernel: blocks are the rows of a tile.

FORMAT is a ``Format`` of ``functional._formats``, with ``block_size`` entries in a row of the tile.
A product that something is added to goes through ``exact``: a compiler that makes one operation of
the two rounds once, and codes would not be those of ``functional``.

Source: see ``functional._quantize`` and ``functional._minifloat``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exact(x, y):
    """X · y, rounded before anything else is done with it."""
    return tl.fma(x, y, 0.0)


@triton.jit
def round_units(x, words, STOCHASTIC: tl.constexpr):
    """x, |x| < 2²², rounded to an integer, at random by words or to nearest, even; float32."""
    if STOCHASTIC:
        down = tl.floor(x)
        up = (x - down) * 16777216.0 > (words >> 8).to(tl.float32)
        return tl.where(up, down + 1.0, down)
    else:
        return (x + 12582912.0) - 12582912.0


@triton.jit
def power_of_two(field):
    """2^(field − 127) for a field of int32 in [0, 254], float32."""
    return tl.where(field > 0, field << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def exponent_scale(scale):
    """An E8M0 scale as float32."""
    field = scale.to(tl.int32)
    return tl.where(field < 255, power_of_two(tl.minimum(field, 254)), float("nan"))


@triton.jit
def encode(
    x, inverse, words, FORMAT: tl.constexpr, SHIFTED: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Codes (int32) of x times the inverses of scales."""
    if FORMAT.exponent_bits == 0:
        units = exact(x, inverse)
        if FORMAT.shared_exponent:
            units *= 64.0
        whole = round_units(units, words, STOCHASTIC)
        if SHIFTED:
            whole = tl.minimum(tl.maximum(whole, 0.0), (1 << FORMAT.bits) - 1.0)
        else:
            whole = tl.minimum(tl.maximum(whole, -FORMAT.largest), FORMAT.largest)
        return whole.to(tl.int32)
    else:
        lowest = 128 - FORMAT.bias
        magnitude = exact(tl.abs(x), inverse)
        exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, lowest)
        units = magnitude * power_of_two(254 + FORMAT.mantissa_bits - exponent)
        whole = round_units(units, words, STOCHASTIC).to(tl.int32)
        code = tl.minimum(((exponent - lowest) << FORMAT.mantissa_bits) + whole, FORMAT.largest)
        sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
        return code | (sign << (FORMAT.exponent_bits + FORMAT.mantissa_bits))


@triton.jit
def decode(codes, FORMAT: tl.constexpr, SHIFTED: tl.constexpr):
    """The numbers (float32) of codes (int32) in units of their scales."""
    if FORMAT.exponent_bits > 0:
        width: tl.constexpr = FORMAT.exponent_bits + FORMAT.mantissa_bits
        bits = (codes & ((1 << width) - 1)) << (23 - FORMAT.mantissa_bits)
        bits |= (codes >> width) << 31
        return bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - FORMAT.bias))
    elif SHIFTED:
        return codes.to(tl.float32)
    else:
        signed = (codes << (32 - FORMAT.bits)) >> (32 - FORMAT.bits)
        values = signed.to(tl.float32)
        if FORMAT.shared_exponent:
            values *= 0.015625
        return values


@triton.jit
def shared_exponents(x, inside, FORMAT: tl.constexpr):
    """E8M0 scales (int32) of blocks, their inverses (float32) and whether blocks are finite."""
    pattern = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    field = tl.max(tl.where(inside, pattern, 0), axis=1) >> 23
    finite = field < 255
    field = tl.maximum(field - FORMAT.largest_exponent, 0)
    inverse = power_of_two(tl.maximum(254 - field, 0))
    return tl.where(finite, field, 255), inverse, finite


@triton.jit
def scales_and_shifts(x, inside, FORMAT: tl.constexpr, SHIFTED: tl.constexpr):
    """Scales, inverses and shifts of blocks (float32) and whether blocks are finite.

    Maxima are those of bit patterns as integers, in which nan is above every number.
    """
    pattern = x.to(tl.int32, bitcast=True)
    if SHIFTED:
        keys = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)  # in the order of the numbers
        low = tl.min(tl.where(inside, keys, 0x7FFFFFFF), axis=1)
        high = tl.max(tl.where(inside, keys, -0x7FFFFFFF), axis=1)
        shift = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        top = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        value = tl.div_rn(top - shift, (1 << FORMAT.bits) - 1.0)
    else:
        largest = tl.max(tl.where(inside, pattern & 0x7FFFFFFF, 0), axis=1)
        shift = tl.zeros(largest.shape, tl.float32)
        value = tl.div_rn(largest.to(tl.float32, bitcast=True), FORMAT.largest_value)
    finite = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    scale = tl.where(finite, tl.maximum(value, 1.1754943508222875e-38), float("nan"))
    inverse = tl.where(finite, tl.div_rn(1.0, scale), 0.0)
    return scale, inverse, tl.where(finite, shift, 0.0), finite


@triton.jit
def pack(codes, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of 4 bits, (GROUP, BLOCK), as bytes, (GROUP, BLOCK // 2), the first one low."""
    low, high = tl.split(codes.reshape(GROUP, BLOCK // 2, 2))
    return (low & 15) | ((high & 15) << 4)


@triton.jit
def unpack(codes, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """What ``pack`` took, without sign."""
    return tl.join(codes & 15, codes >> 4).reshape(GROUP, BLOCK)
