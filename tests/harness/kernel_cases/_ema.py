"""Moving averages: one and several, numbers and tensors, many sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase
from lightning_ext import kernels

SHAPES = [(1,), (17, 33), (), (0, 3), (4096,), (5000,)]


def _tensors(cast: Cast, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [cast(torch.randn(shape, dtype=torch.float64), dtype) for shape in SHAPES]


def _one(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    values, averages = _tensors(cast), _tensors(cast, torch.float32)
    kernels.ema_update_(averages, values, 0.9, fused=fused)
    return {str(x.shape): x for x in averages}


def _several(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    values = _tensors(cast)
    averages = [_tensors(cast, torch.float32) for _ in range(5)]
    kernels.ema_update_(averages, values, [0.9, 1.0, 0.3, 0.0, 0.99], fused=fused)
    return {f"{i} {x.shape}": x for i, each in enumerate(averages) for x in each}


def _tensor_decay(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    values, averages = _tensors(cast), _tensors(cast, torch.float32)
    decay = torch.tensor(0.75, device=cast.device)
    kernels.ema_update_(averages, values, decay, fused=fused)
    return {str(x.shape): x for x in averages}


def _mixed(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    values = [cast(torch.randn(33, dtype=torch.float64), dtype) for dtype in dtypes]
    averages = [cast(torch.randn(33, dtype=torch.float64)) for _ in dtypes]
    kernels.ema_update_(averages, values, 0.9, fused=fused)
    return {str(i): x for i, x in enumerate(averages)}


def _empty(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    kernels.ema_update_([], [], 0.9, fused=fused)
    averages = [cast(torch.zeros(0))]
    kernels.ema_update_(averages, [cast(torch.zeros(0))], 0.9, fused=fused)
    return {"average": averages[0]}


CASES = [
    KernelCase("ema_update_", "one decay", _one),
    KernelCase("ema_update_", "several decays", _several, layouts=("contiguous",)),
    KernelCase("ema_update_", "decay in a tensor", _tensor_decay, layouts=("contiguous",)),
    KernelCase("ema_update_", "mixed dtypes", _mixed, dtypes=(torch.float32,)),
    KernelCase("ema_update_", "empty", _empty, dtypes=(torch.float32,), layouts=("contiguous",)),
]
