"""CAME: matrices and vectors of many sizes, every format of its momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness._kernel_case import Cast, KernelCase
from harness.kernel_cases._trust_updates import (
    F32,
    FORMATS,
    OPTIONS,
    exact_tensors,
    joined,
    number,
    results,
    states,
    steps,
    tensors,
    weights,
)
from lightning_ext import kernels
from lightning_ext.functional import FactoredState

SHAPES: list[tuple[int, ...]] = [(1, 1), (33, 17), (0, 3), (4, 0), (5, 3, 2, 2), (40, 130)]
FEW: list[tuple[int, ...]] = [(3, 100), (2, 1300)]
VECTORS: list[tuple[int, ...]] = [(1,), (), (0,), (700,), (4100,)]
FEW_VECTORS: list[tuple[int, ...]] = [(5,), (2049,)]


def _factors(cast: Cast, shapes: Sequence[tuple[int, ...]]) -> list[FactoredState]:
    found = []
    for shape in shapes:
        lengths = [shape[0], torch.Size(shape[1:]).numel()] * 2
        means = [torch.rand(n, dtype=torch.float64) + 0.1 for n in lengths]
        found.append(FactoredState(*(cast(x, F32) for x in means)))
    return found


def _matrices(
    cast: Cast,
    fused: bool | None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    param: torch.dtype | str | None = None,
    format: torch.dtype | str | None = F32,
    **settings: Any,
) -> dict[str, Tensor]:
    params, held = weights(cast, exact_tensors(shapes), param)
    grads = tensors(cast, shapes)
    means, factors = states(cast, shapes, format, signed=True), _factors(cast, shapes)
    given = {k: v(cast) if callable(v) and k != "reduce" else v for k, v in settings.items()}
    defaults: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99, 0.98)}
    given = defaults | held | given
    clip = kernels.came_update_(
        params, grads, means, factors, steps(cast, shapes), fused=fused, **given
    )
    kept = {f"{name}{i}": x for i, s in enumerate(factors) for name, x in s._asdict().items()}
    exact = torch.float64 if cast.exact else F32
    return results(w=joined(params, held), m=means, clip=[clip.to(exact)]) | kept


def _vectors(
    cast: Cast,
    fused: bool | None,
    shapes: Sequence[tuple[int, ...]] = VECTORS,
    param: torch.dtype | str | None = None,
    formats: tuple[torch.dtype | str, torch.dtype | str] = (F32, F32),
    **settings: Any,
) -> dict[str, Tensor]:
    params, held = weights(cast, exact_tensors(shapes), param)
    grads = tensors(cast, shapes)
    first, second = (states(cast, shapes, x, signed=i == 0) for i, x in enumerate(formats))
    given = {k: v(cast) if callable(v) and k != "reduce" else v for k, v in settings.items()}
    defaults: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.9, 0.9)}
    given = defaults | held | given
    clip = kernels.came_vector_update_(
        params, grads, first, second, steps(cast, shapes), fused=fused, **given
    )
    exact = torch.float64 if cast.exact else F32
    return results(w=joined(params, held), m=first, v=second, clip=[clip.to(exact)])


def _case(op: str, name: str, **settings: Any) -> KernelCase:
    run: Callable[..., dict[str, Tensor]] = _matrices if op == "came_update_" else _vectors
    given = {k: settings.pop(k) for k in ("dtypes", "layouts") if k in settings}
    return KernelCase(op, name, partial(run, **settings), **given)


_QUICK: dict[str, Any] = {"dtypes": (F32,), "layouts": ("contiguous",)}
_ONE = _QUICK | {"shapes": FEW}
_VECTOR = _QUICK | {"shapes": FEW_VECTORS}

CASES = [
    _case("came_update_", "sizes"),
    _case("came_update_", "empty list", shapes=[], **_QUICK),
    _case("came_update_", "tensor lr", lr=number(0.1), maximize=True, **_ONE),
    _case("came_update_", "loose clip", clip_threshold=100.0, reduce=lambda x: 2 * x, **_ONE),
    *[_case("came_update_", m, format=m, **_ONE) for m, _ in FORMATS],
    _case("came_vector_update_", "sizes"),
    _case("came_vector_update_", "empty list", shapes=[], **_QUICK),
    _case("came_vector_update_", "tensor lr", lr=number(0.1), maximize=True, **_VECTOR),
    _case("came_vector_update_", "reduced", reduce=lambda x: 2 * x, **_VECTOR),
    *[_case("came_vector_update_", m, formats=(m, v), **_VECTOR) for m, v in FORMATS],
    *[_case("came_update_", name, **(_ONE | options)) for name, options in OPTIONS.items()],
    *[
        _case("came_vector_update_", name, **(_VECTOR | options))
        for name, options in OPTIONS.items()
    ],
]
