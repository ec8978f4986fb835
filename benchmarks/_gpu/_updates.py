"""Updates of lists of parameters, with states in float32.

The launches move 28 bytes of a float32 parameter for AdamW, 20 for SGD with momentum and Lion, 40
for LAMB and AdamP, 28 for LARS, 32 for CAME of a matrix and 36 of others. Every tensor once would
be 28 for AdamW, LAMB, AdamP and CAME of other than matrices, 20 for the rest. Steps are counted by
the optimizers of torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks._gpu import _update_lists as made
from benchmarks._gpu._timing import Call, Measurement, compiled, in_one, later
from benchmarks._gpu._update_lists import ADAM, RULES, Lists, Shape

Others = Callable[[Lists], dict[str, Call]]


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield every rule in float32, and rules that know them on weights in bfloat16."""
    shapes = made.SMALL if small else made.SHAPES
    chosen = made.SMALL_FEW if small else made.FEW
    for op in RULES:
        for name, shape in shapes.items():
            if fits(op, shape):
                others = nothing if small else others_of(op, few=name == made.FEW)
                yield made.measurement(op, (name, shape), device, others)
        if op in ("adamw_update_", "lion_update_", "sgd_update_"):
            for kind in list(made.WEIGHTS)[1:]:
                yield made.measurement(op, (chosen, shapes[chosen]), device, nothing, kind)
        elif op != "came_vector_update_":
            yield made.measurement(op, (chosen, shapes[chosen]), device, nothing, "bfloat16")


def fits(op: str, shape: Shape) -> bool:
    """Return whether tensors are those of a rule of CAME: matrices, or others."""
    matrices = len(shape[1]) > 1
    return not op.startswith("came") or matrices == (op == "came_update_")


def nothing(lists: Lists) -> dict[str, Call]:
    """Return no other way."""
    return {}


def others_of(op: str, *, few: bool) -> Others:
    """Return torch's ways to do an update; compiled ones only of few tensors."""
    if op == "adamw_update_":
        return lambda lists: torch_adamw(lists, few)
    if op == "sgd_update_":
        settings = ADAM | {"momentum": 0.9}
        return lambda lists: torch_optimizer(torch.optim.SGD, lists, settings, few)
    if op == "lion_update_":
        return lambda lists: torch_lion(lists, few)
    return (lambda lists: torch_formula(op, lists)) if few else nothing


def torch_adamw(lists: Lists, few: bool) -> dict[str, Call]:
    """AdamW of torch, and its launch alone."""
    weights, grads = ([x.clone() for x in column] for column in lists[:2])
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    numbers: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False}
    found = torch_optimizer(torch.optim.AdamW, lists, ADAM, few)
    launch: Any = torch._fused_adamw_
    found["torch fused, launch alone"] = lambda: launch(
        weights, grads, *moments, [], lists.steps, **ADAM, **numbers, maximize=False
    )
    return found


def torch_optimizer(
    kind: Callable[..., torch.optim.Optimizer], lists: Lists, settings: dict[str, Any], few: bool
) -> dict[str, Call]:
    """An optimizer of torch: fused, by lists and compiled."""

    def step(**how: bool) -> Call:
        return later(lambda: made.optimizer(kind, lists, **settings, **how))

    def compiled_step() -> Call:
        # Counts of steps in the memory of the device, as others would be read in every step.
        how = {"capturable": True} if kind is torch.optim.AdamW else {}
        return compiled(made.optimizer(kind, lists, **settings, foreach=True, **how))

    found = {"torch fused": step(fused=True), "torch foreach": step(foreach=True)}
    return found | ({"torch compiled": later(compiled_step)} if few else {})


def torch_lion(lists: Lists, few: bool) -> dict[str, Call]:
    """Lion of operations over lists; torch has no optimizer of it."""
    weights, grads = ([x.clone() for x in column] for column in lists[:2])
    averages = [torch.zeros_like(w) for w in weights]
    lr, weight_decay = ADAM["lr"], ADAM["weight_decay"]

    @torch.no_grad()
    def foreach() -> None:
        signs = torch._foreach_lerp(averages, grads, 0.1)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, signs, alpha=-lr)
        torch._foreach_lerp_(averages, grads, 0.01)

    found: dict[str, Call] = {"torch foreach": foreach}
    return found | ({"torch compiled": later(lambda: compiled(foreach))} if few else {})


def torch_formula(op: str, lists: Lists) -> dict[str, Call]:
    """The plain operations, compiled."""
    return in_one(made.update(op, lists), small=False)
