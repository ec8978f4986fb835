"""The words inside a kernel are those of ``functional.random_bits``."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lightning_ext import functional
from lightning_ext.kernels._triton._quantization._random import random_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def _write(out, seed, step, stream, start, BLOCK: tl.constexpr):
    words = random_bits(seed, step, stream, start, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), words.to(tl.int64))


@pytest.mark.parametrize("block", [4, 64, 1024])
@pytest.mark.parametrize(
    ("seed", "step", "stream", "start"),
    [
        (0, 0, 0, 0),
        (1, 1, 1, 4),
        (2**31, 2**31, 16, 2**31),
        (2**63, 2**32 - 1, 2**32 - 1, 2**34 - 8),
        (2**64 - 1, 12345, 7, 2**40 + 16),
    ],
)
def test_a_kernel_has_the_same_words(
    seed: int, step: int, stream: int, start: int, block: int
) -> None:
    out = torch.empty(block, dtype=torch.int64, device=DEVICE)
    _write[(1,)](out, seed, step, stream, start, BLOCK=block)
    expected = functional.random_bits(block, seed=seed, step=step, stream=stream, offset=start)
    assert torch.equal(out.cpu(), expected)
