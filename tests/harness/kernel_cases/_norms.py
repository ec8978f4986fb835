"""Squared norms by group, of differences and of sums, and norms of units."""

from __future__ import annotations

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase
from lightning_ext import kernels

SHAPES = [(1,), (17, 33), (), (0, 3), (8192,), (9000,), (3, 5)]
GROUPS = [2, 0, 1, 3, 2, 0, 5]  # 4 is empty, 3 has no entries
UNITS = [(5, 7), (33, 150), (16, 3, 3), (1, 300), (300,), (), (3, 0), (0, 3)]
MIXED = (torch.float32, torch.bfloat16, torch.float16)


def _tensors(cast: Cast, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [cast(torch.randn(shape, dtype=torch.float64), dtype) for shape in SHAPES]


def _sq_norms(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    tensors = _tensors(cast)
    return {
        "whole": kernels.sq_norms([None, *tensors], fused=fused),
        "groups": kernels.sq_norms([None, *tensors], [7, *GROUPS], fused=fused),
        "each": kernels.sq_norms(tensors, range(len(tensors)), fused=fused),
    }


def _mixed(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    tensors = [cast(torch.randn(33, dtype=torch.float64), dtype) for dtype in MIXED]
    return {"whole": kernels.sq_norms(tensors, fused=fused)}


def _gradient(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    tensors = [x.requires_grad_() for x in _tensors(cast)]
    kernels.sq_norms(tensors, GROUPS, fused=fused).sum().backward()
    return {str(x.shape): x.grad for x in tensors if x.grad is not None}


def _empty(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    nothing = [cast(torch.zeros(0)), None]
    return {
        "squares": kernels.sq_norms(nothing, [0, 1], fused=fused),
        "differences": kernels.diff_sq_norms(nothing, nothing, fused=fused),
        "accumulated": kernels.accumulated_sq_norms_(nothing, nothing, fused=fused),
    }


def _differences(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    tensors, others = _tensors(cast), _tensors(cast, torch.float32)
    return {
        "whole": kernels.diff_sq_norms(tensors, others, fused=fused),
        "groups": kernels.diff_sq_norms(tensors, others, GROUPS, fused=fused),
        "missing": kernels.diff_sq_norms(
            [tensors[1], None], [None, others[4]], [0, 1], fused=fused
        ),
    }


def _accumulated(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    accumulated, before = _tensors(cast), _tensors(cast, torch.float32)
    found = kernels.accumulated_sq_norms(accumulated, before, GROUPS, fused=fused)
    return {"norms": found[:2], "products": found[2]}


def _accumulated_in_place(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    accumulated, before = _tensors(cast), _tensors(cast, torch.float32)
    found = kernels.accumulated_sq_norms_([*accumulated, None], [*before, None], fused=fused)
    return {"norms": found} | {str(y.shape): y for y in before}


def _units(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    tensors = [cast(torch.randn(shape, dtype=torch.float64)) for shape in UNITS]
    found = kernels.unit_norms(tensors, fused=fused)
    return {str(shape): norms for shape, norms in zip(UNITS, found, strict=True)}


def _mixed_units(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    tensors = [cast(torch.randn(5, 33, dtype=torch.float64), dtype) for dtype in MIXED]
    found = kernels.unit_norms(tensors, fused=fused)
    return {str(i): norms for i, norms in enumerate(found)}


def _unit_gradient(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
    x = cast(torch.randn(5, 33, dtype=torch.float64)).requires_grad_()
    (norms,) = kernels.unit_norms([x], fused=fused)
    norms.square().sum().backward()
    assert x.grad is not None
    return {"gradient": x.grad}


CASES = [
    KernelCase("sq_norms", "groups", _sq_norms),
    KernelCase("sq_norms", "mixed dtypes", _mixed, dtypes=(torch.float32,)),
    KernelCase("sq_norms", "gradient", _gradient, layouts=("contiguous",)),
    KernelCase("sq_norms", "empty", _empty, dtypes=(torch.float32,), layouts=("contiguous",)),
    KernelCase("diff_sq_norms", "groups", _differences),
    KernelCase("accumulated_sq_norms", "groups", _accumulated),
    KernelCase("accumulated_sq_norms_", "one group", _accumulated_in_place),
    KernelCase("unit_norms", "many shapes", _units),
    KernelCase("unit_norms", "mixed dtypes", _mixed_units, dtypes=(torch.float32,)),
    KernelCase("unit_norms", "gradient", _unit_gradient, layouts=("contiguous",)),
]
