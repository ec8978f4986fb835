"""The words of ``functional.random_bits`` inside a kernel.

Source: Salmon et al. 2011, Philox4x32-10.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, step, stream, start, BLOCK: tl.constexpr):
    """Return words ``start`` to ``start + BLOCK`` of the sequence, uint32[BLOCK].

    ``start`` is a multiple of 4, so is BLOCK, a power of two; one counter makes four words.
    """
    counter = tl.cast(start, tl.int64) // 4 + tl.arange(0, BLOCK // 4)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed, low, high, tl.cast(step, tl.uint32), tl.cast(stream, tl.uint32)
    )
    pairs = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [:, i, j] is lane 2 i + j
    return pairs.reshape(BLOCK)


@triton.jit
def random_bits_at(seed, step, stream, offsets):
    """Return the words at some places, int64 of any shape, of the same sequence."""
    counter = offsets // 4
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed, low, high, tl.cast(step, tl.uint32), tl.cast(stream, tl.uint32)
    )
    lane = offsets & 3
    return tl.where(lane == 0, r0, tl.where(lane == 1, r1, tl.where(lane == 2, r2, r3)))
