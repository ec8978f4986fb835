"""Tiles of blocks inside a kernel, from numbers to codes and back.

A program has a tile of G blocks of B entries, one after the other in all rows. FLAT says that they
are also consecutive in memory: rows hold whole blocks only, or there is one row. Tuples that go
through all of it: ``put``, the pointers to codes, scales and shifts; ``plan``, the number of
blocks, bytes of codes in a row (in everything where FLAT), and blocks in a row; ``bits``: seed,
step and stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_ext.kernels._triton._quantization._codes import (
    decode,
    encode,
    exact,
    exponent_scale,
    pack,
    scales_and_shifts,
    shared_exponents,
    unpack,
)
from lightning_ext.kernels._triton._quantization._random import random_bits


@triton.jit
def places(first, blocks, length, per_row, FLAT: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    """Offsets of a tile's entries, (G, B) int64, and which of them are there.

    ``length`` is that of a row, or of everything where FLAT.
    """
    block = first + tl.arange(0, G)
    if FLAT:
        offsets = first * B + (tl.arange(0, G) * B)[:, None] + tl.arange(0, B)[None, :]
        return offsets, offsets < length
    else:
        column = ((block % per_row) * B)[:, None] + tl.arange(0, B)[None, :]
        offsets = (block // per_row)[:, None] * length + column
        return offsets, (block < blocks)[:, None] & (column < length)


@triton.jit
def load_tile(pointer, offsets, inside, whole):
    """Entries of a tile; without a mask, which would cost wide loads, where it is whole."""
    if whole:
        entries = tl.load(pointer + offsets)
    else:
        entries = tl.load(pointer + offsets, mask=inside, other=0)
    return entries


@triton.jit
def store_tile(pointer, offsets, entries, inside, whole):
    if whole:
        tl.store(pointer + offsets, entries)
    else:
        tl.store(pointer + offsets, entries, mask=inside)


@triton.jit
def write_tile(
    x,
    inside,
    whole,
    first,
    put,
    plan,
    bits,
    FORMAT: tl.constexpr,
    SHIFTED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FLAT: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    """Write codes, scales and shifts of x, (G, B) of float32."""
    block = first + tl.arange(0, G)
    present = block < plan[0]
    words = tl.zeros((G, B), tl.uint32)
    if STOCHASTIC:
        words = random_bits(bits[0], bits[1], bits[2], first * B, G * B).reshape(G, B)
    if FORMAT.shared_exponent:
        scale, inverse, finite = shared_exponents(x, inside, FORMAT)
    else:
        scale, inverse, shift, finite = scales_and_shifts(x, inside, FORMAT, SHIFTED)
        if SHIFTED:
            x = x - shift[:, None]
            tl.store(put[2] + block, shift, mask=present)
    tl.store(put[1] + block, scale.to(put[1].dtype.element_ty), mask=present)
    x = tl.where(finite[:, None] & inside, x, 0.0)
    codes = encode(x, inverse[:, None], words, FORMAT, SHIFTED, STOCHASTIC)
    if FORMAT.bits == 4:
        codes = pack(codes, G, B)
        offsets, inside = places(first, plan[0], plan[1], plan[2], FLAT, G, B // 2)
    else:
        offsets, inside = places(first, plan[0], plan[1], plan[2], FLAT, G, B)
    store_tile(put[0], offsets, codes.to(tl.uint8), inside, whole)


@triton.jit
def read_tile(
    whole,
    first,
    put,
    plan,
    FORMAT: tl.constexpr,
    SHIFTED: tl.constexpr,
    FLAT: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    """What codes stand for, (G, B) of float32."""
    block = first + tl.arange(0, G)
    present = block < plan[0]
    if FORMAT.bits == 4:
        offsets, inside = places(first, plan[0], plan[1], plan[2], FLAT, G, B // 2)
        codes = unpack(load_tile(put[0], offsets, inside, whole).to(tl.int32), G, B)
    else:
        offsets, inside = places(first, plan[0], plan[1], plan[2], FLAT, G, B)
        codes = load_tile(put[0], offsets, inside, whole).to(tl.int32)
    scale = tl.load(put[1] + block, mask=present, other=0)
    if FORMAT.shared_exponent:
        scale = exponent_scale(scale)
    x = exact(decode(codes, FORMAT, SHIFTED), scale[:, None])
    if SHIFTED:
        x += tl.load(put[2] + block, mask=present, other=0)[:, None]
    return x


@triton.jit
def reduce_tile(
    whole,
    first,
    put,
    strides,
    plan,
    factor,
    RANKS: tl.constexpr,
    FORMAT: tl.constexpr,
    SHIFTED: tl.constexpr,
    FLAT: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
):
    """``factor`` times the sum over ranks, in their order, of what codes stand for."""
    total = tl.zeros((G, B), tl.float32)
    for rank in range(RANKS):
        place = tl.cast(rank, tl.int64)
        scales = place * strides[1]
        one = (put[0] + place * strides[0], put[1] + scales, put[2] + scales)
        total += read_tile(whole, first, one, plan, FORMAT, SHIFTED, FLAT, G, B)
    return exact(total, factor)


@triton.jit
def is_whole(first, length, FLAT: tl.constexpr, G: tl.constexpr, B: tl.constexpr):
    if FLAT:
        return (first + G) * B <= length
    else:
        return False
