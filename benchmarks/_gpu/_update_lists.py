"""Lists of parameters, gradients and states, and how often an update moves each of them.

Two counts: what our launches read and write, which rows take for `moved_bytes`, and the least,
every tensor once, which is had where all of it stays on the chip between the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks._gpu._timing import Call, Measurement, ways
from lightning_ext import functional, kernels
from lightning_ext.functional import FactoredState, QuantizedState

Shape = tuple[int, tuple[int, ...]]  # tensors, and the shape of each
States = list[Tensor | QuantizedState]

SHAPES: dict[str, Shape] = {
    "800 x 2048": (800, (2048,)),
    "96 x 1024 x 1024": (96, (1024, 1024)),
    "8 x 4096 x 4096": (8, (4096, 4096)),
}
FEW = "8 x 4096 x 4096"  # where there are most variants; torch compiles few tensors soon
SMALL: dict[str, Shape] = {"2 x 5": (2, (5,)), "2 x 3 x 4": (2, (3, 4))}
SMALL_FEW = "2 x 3 x 4"

WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},
    "bfloat16, stochastic": {"rounding": "stochastic", "seed": 1},
    "bfloat16, error bits": {},
}


class Rule(NamedTuple):
    """An update, and how often its launches move each list.

    Where all of a tensor must be known before any of it can be changed, what the change is made of
    is read once more. Moments in few bits may take further launches, which are not counted.

    Attributes:
        settings: of the call.
        weights: how often.
        grads: how often.
        moments: how often each of them.
        factored: whether the second moment is kept by rows and columns, which is next to nothing.
    """

    settings: dict[str, Any]
    weights: int
    grads: int
    moments: tuple[int, ...]
    factored: bool = False


ADAM: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
RULES = {
    # All are read; weights and moments are written.
    "adamw_update_": Rule(ADAM, 2, 1, (2, 2)),
    "lion_update_": Rule(ADAM, 2, 1, (2,)),
    "sgd_update_": Rule(ADAM | {"momentum": 0.9}, 2, 1, (2,)),
    # As AdamW; with both norms known weights and moments are read again.
    "lamb_update_": Rule(ADAM, 3, 1, (3, 3)),
    # Weights and gradients are read for their norms, and again for the step.
    "lars_update_": Rule(ADAM, 3, 2, (2,)),
    # As LAMB, with the products of weights and updates.
    "adamp_update_": Rule(ADAM, 3, 1, (3, 3)),
    # Gradients for their squares, for the RMS of the update and for the momentum, which is read,
    # written, and with its distances from the update known read again.
    "came_update_": Rule(ADAM, 2, 3, (3,), factored=True),
    # Gradients and second moments for the RMS of the update, and again for the momentum.
    "came_vector_update_": Rule(ADAM, 2, 2, (2, 3)),
}


class Lists(NamedTuple):
    """What an update works on."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[Any]
    steps: list[Tensor]
    errors: list[Tensor] | None


def lists_of(
    rule: Rule, shape: Shape, device: torch.device, kind: str = "float32", format: str = "float32"
) -> Lists:
    """Return random weights and gradients of a kind, with states of zeros in a format."""
    count, sizes = shape
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weights, grads = ([torch.randn(sizes, device=device) for _ in range(count)] for _ in range(2))
    errors = None
    if kind == "bfloat16, error bits":
        pairs = [functional.split_weight(w) for w in weights]
        weights, errors = [w for w, _ in pairs], [e for _, e in pairs]
    states: list[Any] = [
        [state_of(sizes, format, signed=k == 0, device=device) for _ in range(count)]
        for k in range(len(rule.moments))
    ]
    if rule.factored:
        states.append([factors_of(sizes, device) for _ in range(count)])
    steps = [torch.tensor(3.0, device=device) for _ in range(count)]
    return Lists(
        [w.to(dtype) for w in weights], [g.to(dtype) for g in grads], states, steps, errors
    )


def state_of(
    sizes: tuple[int, ...], format: str, *, signed: bool, device: torch.device
) -> Tensor | QuantizedState:
    """Return zeros in a format; those of float32 and of rounded bfloat16 are tensors."""
    if format in ("float32", "bfloat16, nearest"):
        dtype = torch.float32 if format == "float32" else torch.bfloat16
        return torch.zeros(sizes, dtype=dtype, device=device)
    return functional.zero_state(sizes, format, signed=signed, device=device)


def factors_of(sizes: tuple[int, ...], device: torch.device) -> FactoredState:
    """Return zeros for rows and columns."""
    rows, columns = sizes[:-1], (*sizes[:-2], sizes[-1])
    return FactoredState(*(torch.zeros(s, device=device) for s in (rows, columns, rows, columns)))


def moved_bytes(rule: Rule, lists: Lists) -> int:
    """Return what the launches of an update read and write."""
    moved = rule.weights * _bytes(lists.weights) + rule.grads * _bytes(lists.grads)
    for times, states in zip(rule.moments, lists.states, strict=False):
        moved += times * _bytes(states)
    return moved + (2 * _bytes(lists.errors) if lists.errors is not None else 0)


def least_bytes(rule: Rule, lists: Lists) -> int:
    """Return what any update must move: all is read once, and all but the gradients written."""
    once = rule._replace(weights=2, grads=1, moments=(2,) * len(rule.moments))
    return moved_bytes(once, lists)


def _bytes(states: States | list[Tensor]) -> int:
    return sum(functional.state_bytes(x) for x in states)


def measurement(
    op: str,
    shape: tuple[str, Shape],
    device: torch.device,
    others: Callable[[Lists], dict[str, Call]],
    kind: str = "float32",
    format: str = "float32",
) -> Measurement:
    """Return an update of new lists, beside other ways to do it."""
    rule, (name, sizes) = RULES[op], shape
    lists = lists_of(rule, sizes, device, kind, format)
    return Measurement(
        thing=op,
        mode=f"states in {format}",
        dtype=kind,
        shape=name,
        variants=ways(update(op, lists, kind)) | others(lists),
        moved_bytes=moved_bytes(rule, lists),
    )


def update(op: str, lists: Lists, kind: str = "float32") -> Callable[[bool | None], object]:
    """Return the suite's own update by ``fused``."""
    options = WEIGHTS[kind] | ({} if lists.errors is None else {"weight_errors": lists.errors})
    call = partial(getattr(kernels, op), *lists[:2], *lists.states, lists.steps)
    return lambda fused: call(fused=fused, **RULES[op].settings, **options)


def optimizer(make: Callable[..., Any], lists: Lists, **settings: Any) -> Callable[[], object]:
    """Return the step of an optimizer of its own copy of the weights; it has stepped once."""
    parameters = [Parameter(w.clone()) for w in lists.weights]
    for parameter, grad in zip(parameters, lists.grads, strict=True):
        parameter.grad = grad
    made = make(parameters, **settings)
    made.step()
    return made.step
