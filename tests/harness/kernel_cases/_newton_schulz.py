"""Calls of Newton–Schulz: shapes on both sides of a tile, stacks, precisions of products."""

from __future__ import annotations

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase, Run
from lightning_ext import kernels


def _run(*shape: int, steps: int = 2, narrow: bool = False) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        x = cast(torch.randn(shape, dtype=torch.float64))
        dtype = x.dtype if narrow else None
        return {"x": kernels.newton_schulz(x, steps=steps, dtype=dtype, fused=fused)}

    return run


CASES = [
    KernelCase("newton_schulz", "one entry", _run(1, 1)),
    KernelCase("newton_schulz", "odd", _run(17, 33)),
    KernelCase("newton_schulz", "tall stack", _run(2, 70, 33)),
    KernelCase("newton_schulz", "several tiles", _run(160, 192, steps=1)),
    KernelCase("newton_schulz", "stack of stacks", _run(1, 2, 5, 5)),
    KernelCase("newton_schulz", "in its own dtype", _run(129, 136, steps=1, narrow=True)),
    KernelCase("newton_schulz", "large tiles", _run(640, 640, steps=1, narrow=True)),
    KernelCase("newton_schulz", "empty", _run(2, 0, 3)),
]
