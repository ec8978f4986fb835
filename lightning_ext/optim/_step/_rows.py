"""The parameters of a group that have a gradient, and their states, as lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext.optim._low_bit._moments import Moment, MomentOf, with_reduction
from lightning_ext.optim._low_bit._weights import weight_error
from lightning_ext.optim._step._checks import Range, check_group
from lightning_ext.optim._step._shards import are_plain, local_parts, placed_like

Init = Callable[[Tensor], Moment] | MomentOf


class Rows(NamedTuple):
    """What a step reads and writes, one entry for each parameter that has a gradient.

    Attributes:
        whole: the parameters as the group holds them.
        params: the parameters, what this rank holds of them.
        grads: their gradients, likewise.
        steps: their counts, this step included.
        states: their other states, likewise, in the order of their names.
        errors: what rounding has left of their weights, where the group keeps that.
        place: of the group's first parameter among all of the optimizer.
    """

    whole: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    states: list[list[Any]]
    errors: list[Tensor] | None = None
    place: int = 0


def rows(
    optimizer: Optimizer,
    group: dict[str, Any],
    states: Mapping[str, Init],
    ranges: Mapping[str, Range] | None = None,
) -> Rows:
    """Collect a group's parameters, count their step and make the states of those that have none.

    Args:
        optimizer: whose step it is.
        group: one of its groups.
        states: for each state what makes it of its parameter, such as ``zeros``.
        ranges: of the optimizer's settings, checked again where a parameter is new.

    Raises:
        TypeError: if a gradient is sparse, or a new parameter is complex.
        ValueError: if a setting of a group with a new parameter is out of range.
    """
    whole = [x for x in group["params"] if x.grad is not None]
    found = [x.grad for x in whole]
    kept = [optimizer.state[x] for x in whole]
    if not all(kept):
        _start(optimizer, group, states, ranges)
    steps = [x["step"] for x in kept]
    if steps:
        _count_one(steps)
    if {x.layout for x in found} - {torch.strided}:
        _refuse_sparse(optimizer, group)
    lists = [[x[name] for x in kept] for name in states]
    errors = None
    if group.get("weight_rounding") == "compensated":
        errors = [weight_error(*pair) for pair in zip(kept, whole, strict=True)]
    place = _place(optimizer, group)
    if are_plain(whole):
        return Rows(whole, whole, found, steps, lists, errors, place)
    found = [placed_like(*pair) for pair in zip(found, whole, strict=True)]
    return Rows(
        whole,
        local_parts(whole),
        local_parts(found),
        steps,
        [_shared(local_parts(x), whole) for x in lists],
        None if errors is None else local_parts(errors),
        place,
    )


def zeros(param: Tensor) -> Tensor:
    """Return zeros of a parameter's shape, dtype, memory format and placement."""
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def count(param: Tensor) -> Tensor:
    """Return a count of steps, 0: float32, beside the parameter unless that is on the CPU.

    Args:
        param: the parameter.
    """
    return torch.zeros((), dtype=torch.float32, device=param.device)


def _count_one(steps: list[Tensor]) -> None:
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        # torch makes a tensor of a number once for each entry, which takes three times as long.
        torch._foreach_add_(steps, torch.ones(()), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1.0)


def _start(
    optimizer: Optimizer,
    group: dict[str, Any],
    states: Mapping[str, Init],
    ranges: Mapping[str, Range] | None,
) -> None:
    index = next(i for i, x in enumerate(optimizer.param_groups) if x is group)
    check_group(optimizer, index, group, ranges)
    _refuse_sparse(optimizer, group)
    for param in group["params"]:
        if param.grad is not None and not optimizer.state[param]:
            made = {name: _made(make, param, group) for name, make in states.items()}
            optimizer.state[param].update(made, step=count(param))


def _made(make: Init, param: Tensor, group: dict[str, Any]) -> Moment:
    return make(param, group) if isinstance(make, MomentOf) else make(param)


def _shared(moments: list[Any], params: Sequence[Tensor]) -> list[Any]:
    return [with_reduction(*pair) for pair in zip(moments, params, strict=True)]


def _place(optimizer: Optimizer, group: dict[str, Any]) -> int:
    """Parameters in the groups before."""
    place = 0
    for one in optimizer.param_groups:
        if one is group:
            break
        place += len(one["params"])
    return place


def _refuse_sparse(optimizer: Optimizer, group: dict[str, Any]) -> None:
    for param in group["params"]:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise TypeError(
                f"{type(optimizer).__name__} got a sparse gradient; it needs dense ones. Hint:"
                " nn.Embedding(sparse=False), or torch.optim.SparseAdam for that parameter"
            )
