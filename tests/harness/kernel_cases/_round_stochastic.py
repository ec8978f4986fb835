"""Cases of stochastic rounding; results as bits, which must be the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase, Run
from lightning_ext import kernels


def _of(*shape: int, seed: int = 0, step: int = 0, stream: int = 0) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        x = cast(torch.randn(shape, dtype=torch.float64), torch.float32)
        out = kernels.round_stochastic(x, seed=seed, step=step, stream=stream, fused=fused)
        return {"bits": out.view(torch.int16)}

    return run


def _specials(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    largest = torch.finfo(torch.float32).max
    values = [math.inf, -math.inf, 0.0, -0.0, largest, -largest, 1e-45, -1e-40]
    x = cast(torch.tensor(values, dtype=torch.float64), torch.float32)
    return {"bits": kernels.round_stochastic(x, seed=1, fused=fused).view(torch.int16)}


CASES = [
    KernelCase("round_stochastic", name, run, dtypes=(torch.float32,))
    for name, run in {
        "one": _of(1),
        "none": _of(0, 3),
        "odd": _of(17, 33, seed=2**64 - 1, step=2**32 - 1, stream=2**31),
        "blocks": _of(3, 1367, seed=1, step=1, stream=1),
        "specials": _specials,
    }.items()
]
