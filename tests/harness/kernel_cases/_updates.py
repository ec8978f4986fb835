"""Elementwise updates: every rule, weight and format, in lists of many sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase
from harness.kernel_cases._trust_updates import in_two, joined
from lightning_ext import functional, kernels
from lightning_ext.functional import QuantizedState

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES: list[tuple[int, ...]] = [(1,), (17, 33), (), (0, 3), (2048,), (4100,)]
FEW: list[tuple[int, ...]] = [(3, 700), (2049,)]

State = Tensor | QuantizedState


def _randn(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _state(
    cast: Cast, shape: Sequence[int], format: torch.dtype | str | None, signed: bool
) -> State:
    """A moment: of a dtype, of that of the case, or in a format."""
    x = _randn(shape) if signed else _randn(shape).square()
    if not isinstance(format, str):
        return cast(x, format)
    state = functional.encode_state(x.float(), format, signed=signed, seed=1)
    codes = state.codes.to(cast.device)
    return state._replace(codes=codes, scales=cast(state.scales, F32))


def _read(name: str, state: State) -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {name: state}
    codes = functional.export_state(state)["codes"]
    if codes.dtype == BF16:
        return {f"{name} bits": codes.view(torch.int16)}
    return {f"{name} codes": codes, f"{name} scales": state.scales}


def _run(
    cast: Cast,
    fused: bool | None,
    *,
    op: str,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    params: Sequence[torch.dtype | None] = (None,),
    formats: Sequence[Sequence[torch.dtype | str | None]] = ((F32, F32),),
    tensors: dict[str, float] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Do an update whose i-th parameter has the i-th dtype and formats, over and over again."""
    places = range(len(shapes))
    weights = [cast(_randn(s), params[i % len(params)]) for i, s in enumerate(shapes)]
    grads = [cast(_randn(s)) for s in shapes]
    states = [
        [_state(cast, s, formats[i % len(formats)][k], k == 0) for i, s in enumerate(shapes)]
        for k in range(len(formats[0]))
    ]
    steps = [cast(torch.tensor(1.0 + 3 * i), F32) for i in places]
    numbers = {name: cast(torch.tensor(x), F32) for name, x in (tensors or {}).items()}
    given = {"lr": 0.1, **numbers, **settings}
    lists: list[Any] = states or [None]
    getattr(kernels, op)(weights, grads, *lists, steps, fused=fused, **given)
    found = {f"weight {i}": x for i, x in enumerate(weights)}
    for k, column in enumerate(states):
        for i, state in enumerate(column):
            found |= _read(f"state {k} of {i}", state)
    return found


def _in_two(cast: Cast, fused: bool | None, *, op: str, moments: int) -> dict[str, Tensor]:
    """Weights in bfloat16 with errors; for the truth what both make."""
    weights, errors = in_two(cast, [_randn(s) for s in FEW])
    grads = [cast(_randn(s)) for s in FEW]
    states = [[_state(cast, s, F32, k == 0) for s in FEW] for k in range(moments)]
    steps = [cast(torch.tensor(2.0), F32) for _ in FEW]
    options = {"lr": 0.1, "weight_errors": errors, "fused": fused}
    getattr(kernels, op)(weights, grads, *states, steps, **options)
    return {str(i): x for i, x in enumerate(joined(weights, options))}


def _case(
    op: str, name: str, *, dtypes: Any = (F32,), layouts: Any = (), **given: Any
) -> KernelCase:
    where = ("contiguous", *layouts)
    return KernelCase(op, name, partial(_run, op=op, **given), dtypes, where)


ALL: dict[str, Any] = {"dtypes": (F32, F16, BF16), "layouts": ("misaligned", "strided")}
FACTORS = {"clip": 0.5, "grad_scale": 4.0, "found_inf": 0.0}
MIXED = {"params": (F32, BF16, F16), "formats": ((F32, F32), (BF16, F32), (F32, F16))}
ONE: dict[str, Any] = {"formats": ((F32,),)}
adamw = partial(_case, "adamw_update_")
lion = partial(_case, "lion_update_")
sgd = partial(_case, "sgd_update_")

CASES = [
    adamw("float32 moments", **ALL),
    adamw("moments like the weights", formats=((None, None),), dtypes=(F16, BF16), shapes=FEW),
    adamw("mixed dtypes", **MIXED),
    adamw("coupled", decoupled_weight_decay=False, shapes=FEW),
    adamw("rate and factors in tensors", tensors=FACTORS | {"lr": 0.1}, maximize=True, shapes=FEW),
    adamw("left out", tensors={"found_inf": 1.0}, formats=(("int8", "int4"),), shapes=FEW),
    *(adamw(name, formats=((name, name),), shapes=FEW) for name in ("bfloat16", "int8", "fp8")),
    adamw(
        "int4", formats=(("int4", "int4"),), layouts=("misaligned",), shapes=[*FEW, (5, 7), (0,)]
    ),
    adamw("int4 coupled", formats=(("int4", "int4"),), decoupled_weight_decay=False, shapes=FEW),
    adamw("several formats", formats=(("int8", "int8"), (F32, F32)), shapes=FEW),
    adamw("random weights", params=(BF16, F32), rounding="stochastic", shapes=FEW),
    KernelCase(
        "adamw_update_",
        "weights in two",
        partial(_in_two, op="adamw_update_", moments=2),
        (F32, BF16),
        ("contiguous", "strided"),
    ),
    adamw("no entries", shapes=[(0, 3)]),
    lion("float32 moments", weight_decay=0.1, **ONE, **ALL),
    lion("int8", formats=(("int8",),), maximize=True, shapes=FEW),
    sgd("plain", formats=((),), weight_decay=0.1, **ALL),
    sgd("momentum", momentum=0.9, dampening=0.5, **ONE, **ALL),
    sgd("nesterov", momentum=0.9, nesterov=True, weight_decay=0.1, **ONE, shapes=FEW),
]
