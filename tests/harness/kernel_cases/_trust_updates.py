"""LAMB and LARS: every option and format, in lists of many sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase
from lightning_ext import functional, kernels
from lightning_ext.functional import QuantizedState

SHAPES: list[tuple[int, ...]] = [(1,), (17, 33), (), (0, 3), (2048,), (4100,)]
FEW: list[tuple[int, ...]] = [(3, 100), (2049,)]
F32 = torch.float32


def tensors(
    cast: Cast, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return a normal tensor of each shape."""
    return [cast(x, dtype) for x in exact_tensors(shapes)]


def steps(cast: Cast, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return counts, another one for each parameter."""
    counts = range(len(shapes))
    return [cast(torch.tensor(1.0 + 3 * k, dtype=torch.float64), F32) for k in counts]


def states(
    cast: Cast, shapes: Sequence[tuple[int, ...]], format: torch.dtype | str | None, *, signed: bool
) -> list[Any]:
    """Return moments as a run under way has them."""
    found: list[Any] = []
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64) * 0.1
        x = x if signed else x.square()
        if format is None or isinstance(format, torch.dtype):
            found.append(cast(x, format))
            continue
        state = functional.encode_state(x.float(), format, signed=signed)
        codes = cast(state.codes, torch.bfloat16) if format == "bfloat16" else cast(state.codes)
        found.append(state._replace(codes=codes, scales=cast(state.scales, F32)))
    return found


def in_two(cast: Cast, exact: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return weights in bfloat16 and their errors; for the truth what both make, and ``None``."""
    pairs = [functional.split_weight(x.float()) for x in exact]
    if cast.exact:
        return [functional.join_weight(*pair).double() for pair in pairs], None
    return [cast(x, torch.bfloat16) for x, _ in pairs], [x.to(cast.device) for _, x in pairs]


def weights(
    cast: Cast, exact: Sequence[Tensor], dtype: torch.dtype | str | None
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return weights in a dtype, or "in two", and the option that goes with them."""
    if dtype == "in two":
        params, errors = in_two(cast, exact)
        return params, {"weight_errors": errors}
    assert not isinstance(dtype, str), dtype
    return [cast(x, dtype) for x in exact], {}


def joined(params: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Return the numbers that weights are."""
    errors = options.get("weight_errors")
    if errors is None:
        return list(params)
    return [functional.join_weight(*pair) for pair in zip(params, errors, strict=True)]


def exact_tensors(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return a normal tensor of each shape before it is rounded."""
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def results(**lists: Sequence[Tensor | QuantizedState]) -> dict[str, Tensor]:
    """Return everything that an update changes; codes of four bits one by one."""
    found: dict[str, Tensor] = {}
    for name, column in lists.items():
        for i, x in enumerate(column):
            if isinstance(x, Tensor):
                found[f"{name}{i}"] = x
            else:
                codes = functional.export_state(x)["codes"]
                found[f"{name}{i}"] = codes
                found[f"{name}{i} scales"] = x.scales
    return found


def _lamb(
    cast: Cast,
    fused: bool | None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    param: torch.dtype | str | None = None,
    formats: tuple[torch.dtype | str | None, torch.dtype | str | None] = (F32, F32),
    **settings: Any,
) -> dict[str, Tensor]:
    params, held = weights(cast, exact_tensors(shapes), param)
    grads = tensors(cast, shapes)
    first, second = (states(cast, shapes, x, signed=i == 0) for i, x in enumerate(formats))
    given = {k: v(cast) if callable(v) and k != "reduce" else v for k, v in settings.items()}
    trust = kernels.lamb_update_(
        params,
        grads,
        first,
        second,
        steps(cast, shapes),
        fused=fused,
        **({"lr": 0.1} | held | given),
    )
    # Where moments are rounded, what is made of them is as exact as these.
    kept = torch.float64 if cast.exact else cast.dtype if None in formats else F32
    return results(x=joined(params, held), m=first, v=second, trust=[trust.to(kept)])


def _lars(
    cast: Cast,
    fused: bool | None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    param: torch.dtype | str | None = None,
    format: torch.dtype | str = F32,
    **settings: Any,
) -> dict[str, Tensor]:
    params, held = weights(cast, exact_tensors(shapes), param)
    grads = tensors(cast, shapes)
    buffers = states(cast, shapes, format, signed=True)
    given = {k: v(cast) if callable(v) and k != "reduce" else v for k, v in settings.items()}
    given = {"lr": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.1} | held | given
    trust = kernels.lars_update_(params, grads, buffers, steps(cast, shapes), fused=fused, **given)
    kept = torch.float64 if cast.exact else F32
    return results(w=joined(params, held), v=buffers, trust=[trust.to(kept)])


def number(value: float) -> Any:
    """Return what makes a tensor of one number."""
    return lambda cast: cast(torch.tensor(value, dtype=torch.float64), F32)


def _case(op: str, name: str, **settings: Any) -> KernelCase:
    run: Callable[..., dict[str, Tensor]] = _lamb if op == "lamb_update_" else _lars
    given = {k: settings.pop(k) for k in ("dtypes", "layouts") if k in settings}
    return KernelCase(op, name, partial(run, **settings), **given)


_ONE: dict[str, Any] = {"dtypes": (F32,), "layouts": ("contiguous",), "shapes": FEW}
FORMATS = [("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "int4"), ("fp8", "fp8")]
OPTIONS: dict[str, dict[str, Any]] = {
    "in two": {"param": "in two", "layouts": ("contiguous", "strided")},
    "at random": {"param": torch.bfloat16, "rounding": "stochastic", "seed": 3, "stream": 8},
    "scaled": {"grad_scale": number(4.0), "clip": number(0.5), "found_inf": number(0.0)},
    "left out": {"param": torch.bfloat16, "found_inf": number(1.0)},
}

CASES = [
    _case("lamb_update_", "sizes"),
    _case("lamb_update_", "empty list", shapes=[], dtypes=(F32,), layouts=("contiguous",)),
    _case("lamb_update_", "moments of the dtype", formats=(None, None), shapes=FEW),
    _case("lamb_update_", "tensor numbers", lr=number(0.1), clip=number(0.3), **_ONE),
    _case("lamb_update_", "ranges", norm_range=(0.5, 10.0), trust_clip=1.5, maximize=True, **_ONE),
    _case("lamb_update_", "no ratio", trust_ratio=False, bias_correction=False, **_ONE),
    _case("lamb_update_", "reduced", reduce=lambda sums: 2 * sums, trust_clip=2.0, **_ONE),
    *[
        _case("lamb_update_", f"{m} {v}", formats=(m, v), **_ONE, clip=number(0.3))
        for m, v in FORMATS
    ],
    _case("lars_update_", "sizes"),
    _case("lars_update_", "empty list", shapes=[], dtypes=(F32,), layouts=("contiguous",)),
    _case("lars_update_", "tensor lr", lr=number(0.1), nesterov=True, maximize=True, **_ONE),
    _case("lars_update_", "larc", larc=True, lr=0.01, **_ONE),
    _case("lars_update_", "larc tensor lr", larc=True, lr=number(0.01), **_ONE),
    _case("lars_update_", "paper", lr_in_momentum=True, nesterov=True, **_ONE),
    _case("lars_update_", "no ratio", trust_ratio=False, **_ONE),
    _case("lars_update_", "reduced", reduce=lambda sums: 2 * sums, larc=True, **_ONE),
    *[_case("lars_update_", m, format=m, **_ONE) for m, _ in FORMATS],
    *[
        _case(op, name, **(_ONE | options))
        for op in ("lamb_update_", "lars_update_")
        for name, options in OPTIONS.items()
    ],
]
