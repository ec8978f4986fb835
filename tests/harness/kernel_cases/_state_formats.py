"""States of every format, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase
from lightning_ext import functional, kernels
from lightning_ext.functional import QuantizedState

FORMATS = [(format, s) for format in ("int8", "int4", "fp8") for s in (True, False)]
# Of an odd number of rows and columns; of rows longer than a block of the launch; of none.
SHAPES: dict[tuple[int, ...], list[tuple[str, bool]]] = {
    (17, 33): [*FORMATS, ("float32", True), ("bfloat16", True)],
    (2500,): [*FORMATS, ("bfloat16", True)],
    (3, 1301): [("int4", False)],
    (1,): [("int4", True), ("int4", False), ("fp8", True)],
    (0, 3): [("int8", True), ("int4", False)],
}


def _moment(shape: Sequence[int], signed: bool) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[::7] *= 1e-3
    x.view(-1)[::11] = 0
    return x if signed else x.square()


def _codes(state: QuantizedState) -> Tensor:
    codes = functional.export_state(state)["codes"]
    return codes.view(torch.int16) if codes.dtype == torch.bfloat16 else codes


def _encode(
    cast: Cast, fused: bool | None, *, shape: Sequence[int], format: str, signed: bool
) -> dict[str, Tensor]:
    x = cast(_moment(shape, signed))
    state = kernels.encode_state(x, format, signed=signed, seed=3, step=5, stream=7, fused=fused)
    return {"codes": _codes(state), "scales": state.scales}


def _decode(
    cast: Cast, fused: bool | None, *, shape: Sequence[int], format: str, signed: bool
) -> dict[str, Tensor]:
    state = functional.encode_state(_moment(shape, signed).float(), format, signed=signed, seed=1)
    codes, scales = (cast(y, y.dtype) for y in state[:2])
    x = kernels.decode_state(state._replace(codes=codes, scales=scales), fused=fused)
    return {"x": x, "scales": scales}  # which stay what they were


def _cases(op: str, run: Callable[..., dict[str, Tensor]], **options: Any) -> list[KernelCase]:
    return [
        KernelCase(
            op,
            f"{format}_{'signed' if sign else 'unsigned'}_{'x'.join(map(str, shape))}",
            partial(run, shape=shape, format=format, signed=sign),
            **options,
        )
        for shape, formats in SHAPES.items()
        for format, sign in formats
    ]


CASES = [
    *_cases("encode_state", _encode),
    *_cases("decode_state", _decode, dtypes=(torch.float32,)),
]
