"""Weights inside a kernel: read as float32, and written to the nearest number, at random or in two.

``L.weight`` says which: "nearest" (float32, bfloat16 or float16), "stochastic" (bfloat16, others to
nearest), "errors" (bfloat16 and int8, as ``functional.split_weight`` makes them, in the column
``L.errors``). Weights are column 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._quantization._random import random_bits, random_bits_at
from lightning_ext.kernels._triton._quantization._round_stochastic import round_to_bfloat16
from lightning_ext.kernels._triton._updates._layout import STREAMS


@triton.jit
def load_weight(tile, offsets, L: tl.constexpr, MASKED: tl.constexpr):
    """Weights in float32, 0 behind the end.

    offsets: those of the tile, or of any entries of its parameter, int64.
    """
    if L.weight == "errors":
        high = _load_bits(tile, offsets, 0, tl.int16, L, MASKED)
        low = _load_bits(tile, offsets, L.errors, tl.int8, L, MASKED)
        return ((high << 16) + (low << 8)).to(tl.float32, bitcast=True)
    else:
        where = multi.address(tile[0], tile[1], 0, tile[2])
        code = multi.dtype_code(tile[0], tile[1], L.columns, 0, tile[2], L.dtypes[0])
        return multi.load(where, code, offsets, tile[4], L.dtypes[0], L.aligned, MASKED)


@triton.jit
def store_weight(tile, offsets, x, bits, L: tl.constexpr, MASKED: tl.constexpr):
    """Write weights; bits: seed, step and first stream, as ``store_state_of`` takes them."""
    if L.weight == "nearest":
        _store_nearest(tile, offsets, x, L, MASKED)
    elif L.weight == "stochastic":
        if L.dtypes[0] is None:
            if multi.dtype_code(tile[0], tile[1], L.columns, 0, tile[2], None) == 1:
                _store_random(tile, offsets, x, bits, L, MASKED)
            else:
                _store_nearest(tile, offsets, x, L, MASKED)
        else:
            _store_random(tile, offsets, x, bits, L, MASKED)
    else:
        pattern = x.to(tl.int32, bitcast=True)
        pattern = tl.where((pattern & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, pattern)
        short = (pattern + 127 + ((pattern >> 8) & 1)) >> 8
        high = (short + 128) >> 8
        _store_bits(tile, offsets, high, 0, tl.int16, L, MASKED)
        _store_bits(tile, offsets, short - (high << 8), L.errors, tl.int8, L, MASKED)


@triton.jit
def _store_nearest(tile, offsets, x, L: tl.constexpr, MASKED: tl.constexpr):
    where = multi.address(tile[0], tile[1], 0, tile[2])
    code = multi.dtype_code(tile[0], tile[1], L.columns, 0, tile[2], L.dtypes[0])
    multi.store(where, code, offsets, tile[4], x, L.dtypes[0], L.aligned, MASKED)


@triton.jit
def _store_random(tile, offsets, x, bits, L: tl.constexpr, MASKED: tl.constexpr):
    seed, step, stream = bits
    stream = stream + STREAMS * tile[2]
    if len(offsets.shape) == 1:  # those of a tile
        words = random_bits(seed, step, stream, tile[3], L.block)
    else:
        words = random_bits_at(seed, step, stream, offsets)
    _store_bits(tile, offsets, round_to_bfloat16(x, words), 0, tl.int16, L, MASKED)


@triton.jit
def _pointer(tile, offsets, COLUMN: tl.constexpr, DTYPE: tl.constexpr, L: tl.constexpr):
    pointer = multi.address(tile[0], tile[1], COLUMN, tile[2]).to(tl.pointer_type(DTYPE))
    if L.aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offsets


@triton.jit
def _load_bits(
    tile, offsets, COLUMN: tl.constexpr, DTYPE: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr
):
    pointer = _pointer(tile, offsets, COLUMN, DTYPE, L)
    if MASKED:
        return tl.load(pointer, mask=offsets < tile[4], other=0).to(tl.int32)
    else:
        return tl.load(pointer).to(tl.int32)


@triton.jit
def _store_bits(
    tile, offsets, x,
    COLUMN: tl.constexpr, DTYPE: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    pointer = _pointer(tile, offsets, COLUMN, DTYPE, L)
    if MASKED:
        tl.store(pointer, x.to(DTYPE), mask=offsets < tile[4])
    else:
        tl.store(pointer, x.to(DTYPE))
