"""AdamP: gradients along the weights and across, in every option and format."""

from __future__ import annotations

from collections.abc import Sequence
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
    weights,
)
from lightning_ext import kernels

SHAPES: list[tuple[int, ...]] = [(1, 1), (17, 33), (), (0, 3), (700,), (5, 3, 2, 2), (3, 600)]
FEW: list[tuple[int, ...]] = [(3, 100), (5,), (2, 1300)]


def gradient(weight: Tensor, kind: int) -> Tensor:
    """Return a gradient that is orthogonal to each row, 0, to the whole, 1, or to neither, 2."""
    grad = torch.randn_like(weight)
    if weight.dim() < 2 or not weight.numel():
        return grad
    rows, along = grad.flatten(1), weight.flatten(1)
    if kind == 0:
        rows = rows - along * (rows * along).sum(1, True) / along.square().sum(1, True)
    elif kind == 1:
        # Each row along its weights, with shares that add up to nothing.
        shares = torch.linspace(-1, 1, len(rows), dtype=rows.dtype)[:, None]
        rows = along * shares
        rows = rows - along * (rows * along).sum() / along.square().sum()
    else:
        rows = rows + along
    return rows.view(weight.shape)


def _run(
    cast: Cast,
    fused: bool | None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    param: torch.dtype | str | None = None,
    formats: tuple[torch.dtype | str, torch.dtype | str] = (F32, F32),
    kinds: Sequence[int] = (0, 1, 2),
    **settings: Any,
) -> dict[str, Tensor]:
    exact = exact_tensors(shapes)
    grads = [cast(gradient(x, kinds[i % len(kinds)])) for i, x in enumerate(exact)]
    params, held = weights(cast, exact, param)
    first, second = (states(cast, shapes, x, signed=i == 0) for i, x in enumerate(formats))
    given = {k: v(cast) if callable(v) and k != "reduce" else v for k, v in settings.items()}
    given = {"lr": 0.1, "weight_decay": 0.1, "delta": 0.5} | held | given
    projected = kernels.adamp_update_(
        params, grads, first, second, steps(cast, shapes), fused=fused, **given
    )
    found = results(w=joined(params, held), m=first, v=second)
    return found | {"projected": (projected > 0).int()}


def _case(name: str, **settings: Any) -> KernelCase:
    given = {k: settings.pop(k) for k in ("dtypes", "layouts") if k in settings}
    return KernelCase("adamp_update_", name, partial(_run, **settings), **given)


_ONE: dict[str, Any] = {"dtypes": (F32,), "layouts": ("contiguous",), "shapes": FEW}

CASES = [
    _case("sizes"),
    _case("sizes again", kinds=(1, 2, 0), dtypes=(F32,), layouts=("contiguous",)),
    _case("empty list", shapes=[], dtypes=(F32,), layouts=("contiguous",)),
    _case("nesterov", nesterov=True, maximize=True, kinds=(0, 1), **_ONE),
    _case("tensor lr", lr=number(0.1), kinds=(0, 0, 1), **_ONE),
    _case("reduced", reduce=lambda sums: 2 * sums, kinds=(2, 2, 1), **_ONE),
    *[_case(f"{m} {v}", formats=(m, v), kinds=(0, 2, 1), **_ONE) for m, v in FORMATS],
    *[_case(name, **(_ONE | options)) for name, options in OPTIONS.items()],
]
