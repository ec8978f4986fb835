"""Cases of block quantization and of sums of what ranks have sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase, Run
from lightning_ext import functional, kernels
from lightning_ext.functional import Quantized


def _numbers(*shape: int) -> Tensor:
    """Of several magnitudes, with a block of zeros where there is room for it."""
    x = torch.randn(shape, dtype=torch.float64) * torch.randn(shape).exp()
    x[..., 64:128] = 0
    return x


def _codes(found: Quantized) -> dict[str, Tensor]:
    """What can be compared: codes that are next to each other, scales and shifts."""
    codes = found.codes
    if found.format in ("int4", "mxfp4_e2m1"):
        codes = torch.stack([codes & 15, codes >> 4], dim=-1)
    elif found.format in ("int8", "mxint8") and found.shifts is None:
        codes = codes.view(torch.int8)
    shifts = {} if found.shifts is None else {"shifts": found.shifts}
    return {"codes": codes, "scales": found.scales} | shifts


def _received(cast: Cast, *shape: int, **options: Any) -> Quantized:
    """Codes that are the same in every run of a case."""
    found = functional.quantize(_numbers(*shape).float(), **options)
    shifts = None if found.shifts is None else cast(found.shifts, torch.float32)
    scales = cast(found.scales, torch.float32)
    return found._replace(codes=cast(found.codes), scales=scales, shifts=shifts)


def _quantize(*shape: int, **options: Any) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        return _codes(kernels.quantize(cast(_numbers(*shape)), **options, fused=fused))

    return run


def _dequantize(*shape: int, **options: Any) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        dtype = torch.float64 if cast.exact else cast.dtype
        received = _received(cast, *shape, **options)
        return {"x": kernels.dequantize(received, dtype=dtype, fused=fused)}

    return run


def _reduce(*shape: int, reduction: str = "mean", **options: Any) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        dtype = torch.float64 if cast.exact else cast.dtype
        received = _received(cast, *shape, **options)
        reduced = kernels.dequantize_reduce(received, reduction=reduction, dtype=dtype, fused=fused)
        return {"reduced": reduced}

    return run


def _requantize(*shape: int, again: dict[str, Any], **options: Any) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        received = _received(cast, *shape, **options)
        return _codes(kernels.dequantize_reduce_quantize(received, **again, fused=fused))

    return run


_SINGLE = (torch.float32,)
_CASES: dict[str, dict[str, Run]] = {
    "quantize": {
        "rows": _quantize(4, 512, format="int8"),
        "one": _quantize(1, format="int8"),
        "none": _quantize(3, 0, format="int8"),
        "shifted": _quantize(3, 37, format="int8", symmetric=False, block_size=16),
        "nibbles": _quantize(1001, format="int4", block_size=64),
        "shifted nibbles": _quantize(2, 77, format="int4", symmetric=False, block_size=32),
        "stochastic": _quantize(3, 200, format="int4", block_size=128, seed=2**40, step=7),
        "e4m3": _quantize(5, 300, format="fp8_e4m3", block_size=128),
        "e5m2": _quantize(777, format="fp8_e5m2", seed=1, step=1, stream=1),
        "mxint8": _quantize(3, 70, format="mxint8"),
        "mxfp6": _quantize(2, 192, format="mxfp6_e3m2"),
        "mxfp4": _quantize(2, 95, format="mxfp4_e2m1", seed=3),
        "programs": _quantize(9, 1000, format="mxfp8_e4m3"),
    },
    "dequantize": {
        "rows": _dequantize(4, 512, format="int8"),
        "one": _dequantize(1, format="int8"),
        "none": _dequantize(3, 0, format="int8"),
        "shifted": _dequantize(3, 37, format="int8", symmetric=False, block_size=16),
        "nibbles": _dequantize(1001, format="int4", block_size=64),
        "e4m3": _dequantize(5, 300, format="fp8_e4m3", block_size=128),
        "mxint8": _dequantize(3, 70, format="mxint8"),
        "mxfp4": _dequantize(2, 95, format="mxfp4_e2m1"),
    },
    "dequantize_reduce": {
        "ranks": _reduce(5, 512, format="int8"),
        "one rank": _reduce(1, 1, format="int8"),
        "none": _reduce(3, 2, 0, format="int8"),
        "nibbles": _reduce(4, 3, 333, format="int4", block_size=64, reduction="sum"),
        "shifted": _reduce(3, 70, format="int8", symmetric=False, block_size=16),
        "mxfp8": _reduce(2, 95, format="mxfp8_e5m2"),
    },
    "dequantize_reduce_quantize": {
        "ranks": _requantize(4, 3, 512, format="int8", again={}),
        "one": _requantize(1, 1, format="int8", again={"reduction": "sum"}),
        "none": _requantize(3, 2, 0, format="int8", again={}),
        "nibbles": _requantize(
            4, 1001, format="int4", block_size=64, again={"seed": 2**63, "step": 3}
        ),
        "to nibbles": _requantize(
            3, 2, 77, format="int8", symmetric=False, again={"format": "int4"}
        ),
        "shifted": _requantize(2, 333, format="int4", block_size=64, again={"symmetric": False}),
        "mxfp8": _requantize(2, 5, 95, format="mxfp8_e4m3", again={"format": "mxfp4_e2m1"}),
    },
}
_EVERY_DTYPE = {("quantize", "rows"), ("dequantize", "nibbles"), ("dequantize_reduce", "ranks")}

CASES = [
    KernelCase(op, name, run)
    if (op, name) in _EVERY_DTYPE
    else KernelCase(op, name, run, dtypes=_SINGLE)
    for op, runs in _CASES.items()
    for name, run in runs.items()
]
