"""Stochastic rounding to bfloat16, by the bits of ``functional.round_stochastic``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._quantization._code_tiles import load_tile, store_tile
from lightning_ext.kernels._triton._quantization._random import random_bits

_BLOCK = 2048


@triton.jit
def round_to_bfloat16(x, bits):
    """The bits of bfloat16 (int16) to which x, float32, is rounded by the words ``bits``."""
    pattern = x.to(tl.int32, bitcast=True)
    magnitude = pattern & 0x7FFFFFFF
    noise = tl.where(magnitude < 0x7F7F0000, (bits & 0xFFFF).to(tl.int32), 0)
    pattern = tl.where(magnitude > 0x7F800000, pattern | 0x00400000, pattern)
    return ((pattern + noise) >> 16).to(tl.int16)


# One program for any step: nothing is to be compiled for those that are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["seed", "step", "stream"])
def round_stochastic_kernel(x, out, size, seed, step, stream, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < size
    whole = start + BLOCK <= size
    values = load_tile(x, offsets, inside, whole).to(tl.float32)
    rounded = round_to_bfloat16(values, random_bits(seed, step, stream, start, BLOCK))
    store_tile(out, offsets, rounded, inside, whole)


def round_stochastic(x: Tensor, *, seed: int, step: int, stream: int) -> Tensor:
    """Launch the kernel; arguments as in ``functional.round_stochastic``, checked by the caller."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    if x.numel():
        round_stochastic_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, out.view(torch.int16), x.numel(), seed, step, stream, BLOCK=_BLOCK, num_warps=4
        )
    return out
