"""Cases of signs as bits; bytes are compared bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase, Run
from lightning_ext import functional, kernels


def _numbers(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return torch.where(x.abs() < 0.2, 0.0 * x, x)  # zeros of both signs


def _ballots(cast: Cast, *shape: int) -> Tensor:
    return cast(functional.pack_signs(_numbers(*shape)))


def _bits(packed: Tensor) -> dict[str, Tensor]:
    return {"bits": (packed[..., None] >> torch.arange(8, device=packed.device)) & 1}


def _pack(*shape: int) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        return _bits(kernels.pack_signs(cast(_numbers(*shape)), fused=fused))

    return run


def _unpack(*shape: int) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        dtype = torch.float64 if cast.exact else cast.dtype
        packed = _ballots(cast, *shape)
        return {"x": kernels.unpack_signs(packed, shape[-1], dtype=dtype, fused=fused)}

    return run


def _sum(*shape: int) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        return {"sums": kernels.sum_signs(_ballots(cast, *shape), shape[-1], fused=fused)}

    return run


def _vote(*shape: int) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        return _bits(kernels.majority_vote(_ballots(cast, *shape), fused=fused))

    return run


def _votes(*shape: int) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        dtype = torch.float64 if cast.exact else cast.dtype
        votes = functional.majority_vote(_ballots(cast, *shape))
        return {"x": kernels.unpack_votes(votes, shape[-1], dtype=dtype, fused=fused)}

    return run


_SINGLE = (torch.float32,)

CASES = [
    KernelCase("pack_signs", "rows", _pack(3, 1024)),
    KernelCase("pack_signs", "odd", _pack(2, 3, 37), dtypes=_SINGLE),
    KernelCase("pack_signs", "programs", _pack(10_001), dtypes=_SINGLE),
    KernelCase("pack_signs", "one", _pack(1), dtypes=_SINGLE),
    KernelCase("pack_signs", "none", _pack(3, 0), dtypes=_SINGLE),
    KernelCase("unpack_signs", "rows", _unpack(3, 1024)),
    KernelCase("unpack_signs", "odd", _unpack(5, 37), dtypes=_SINGLE),
    KernelCase("unpack_signs", "none", _unpack(0), dtypes=_SINGLE),
    KernelCase("unpack_signs", "programs", _unpack(10_001), dtypes=_SINGLE),
    *(
        KernelCase(op, name, make(*shape), dtypes=_SINGLE)
        for op, make in [("sum_signs", _sum), ("majority_vote", _vote), ("unpack_votes", _votes)]
        for name, shape in {
            "odd": (3, 2, 37),
            "ties": (4, 3, 29),
            "one": (1, 1),
            "none": (2, 0),
            "programs": (2, 10_001),
            "many": (200, 24),
        }.items()
    ),
]
