"""The step of a group: of lists of parameters, or of one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional import QuantizedState
from lightning_ext.optim._low_bit._moments import kind_of
from lightning_ext.optim._step._rows import Rows
from lightning_ext.optim._step._shards import shard_index

STREAMS = 4  # of random bits, that an update of a list takes for each parameter
_APART = 0x9E3779B97F4A7C15  # an odd number near 2⁶⁴/φ: seeds of parts are far from each other
Reduce = Callable[[Sequence[Tensor]], Any]


def update(
    listed: Callable[..., Any],
    formula: Callable[..., Any],
    found: Rows,
    settings: dict[str, Any],
    group: dict[str, Any],
    *,
    reduce: Reduce | None = None,
    counted: bool = True,
) -> Any:
    """Do a step of the parameters of a group: of lists, or of one after the other.

    Args:
        listed: the update of lists, in place.
        formula: the update of one parameter, which returns what is new; taken for
            ``foreach=False``, but where states or weights have few bits.
        found: parameters, gradients and states.
        settings: of both forms; ``clip`` is what gradients are multiplied by first.
        group: says ``foreach`` and, where there are kernels, ``fused``.
        reduce: of parameters, what adds up their sums over ranks, where the formula needs it.
        counted: whether the formula takes the count of steps.

    Returns:
        What the update of lists returns; ``None`` of the other.
    """
    if not found.params:
        return None
    one_by_one = group.get("foreach") is False and not group.get("fused")
    if _is_low_bit(found, group):
        return _by_formats(listed, found, settings, group, reduce, one_by_one=one_by_one)
    if not one_by_one:
        with_steps = [found.steps] if counted else []
        return _call(listed, found, with_steps, settings, group, reduce)
    settings = dict(settings)
    clip = settings.pop("clip", None)
    for i, (param, grad) in enumerate(zip(found.params, found.grads, strict=True)):
        grad = grad if clip is None else grad * clip
        old = [state[i] for state in found.states]
        with_step = [found.steps[i]] if counted else []
        how = {} if reduce is None else {"reduce": reduce(found.whole[i : i + 1])}
        new = formula(param, grad, *old, *with_step, **settings, **how)
        for tensor, value in zip((param, *old), new, strict=True):
            tensor.copy_(value)
    return None


def _call(
    listed: Callable[..., Any],
    found: Rows,
    with_steps: list[list[Tensor]],
    settings: dict[str, Any],
    group: dict[str, Any],
    reduce: Reduce | None,
) -> Any:
    how = {"fused": group["fused"]} if "fused" in group else {}
    how |= {} if reduce is None else {"reduce": reduce(found.whole)}
    return listed(found.params, found.grads, *found.states, *with_steps, **settings, **how)


def _is_low_bit(found: Rows, group: dict[str, Any]) -> bool:
    if group.get("weight_rounding", "nearest") != "nearest":
        return True
    if group.get("state_dtype") in (None, "float32"):
        return False
    return any(isinstance(x, QuantizedState) for state in found.states for x in state)


def _by_formats(
    listed: Callable[..., Any],
    found: Rows,
    settings: dict[str, Any],
    group: dict[str, Any],
    reduce: Reduce | None,
    *,
    one_by_one: bool,
) -> Any:
    """A call for each combination of formats, as kernels take one alone, or for each parameter."""
    parts: dict[Any, list[int]] = {}
    for i in range(len(found.params)):
        kinds = tuple(kind_of(state[i]) for state in found.states)
        key = i if one_by_one else (kinds, shard_index(found.whole[i]))
        parts.setdefault(key, []).append(i)
    stream, results = STREAMS * found.place, []
    for chosen in parts.values():
        part = _chosen(found, chosen)
        options = _options(part, group, stream)
        results.append(_call(listed, part, [part.steps], settings | options, group, reduce))
        stream += STREAMS * len(chosen)
    if not isinstance(results[0], Tensor):
        return None
    order = torch.tensor([i for chosen in parts.values() for i in chosen])
    return torch.cat(results)[order.argsort().to(results[0].device)]


def _chosen(found: Rows, places: list[int]) -> Rows:
    columns = (found.whole, found.params, found.grads, found.steps, *found.states)
    whole, params, grads, steps, *states = ([x[i] for i in places] for x in columns)
    errors = None if found.errors is None else [found.errors[i] for i in places]
    return Rows(whole, params, grads, steps, states, errors, found.place)


def _options(found: Rows, group: dict[str, Any], stream: int) -> dict[str, Any]:
    """How weights are rounded, and by which bits whatever is rounded at random."""
    bits = {"seed": shard_seed(group.get("seed", 0), found.whole[0]), "stream": stream}
    if found.errors is not None:
        return bits | {"weight_errors": found.errors}
    if group.get("weight_rounding") == "stochastic":
        return bits | {"rounding": "stochastic"}
    return bits if any(kind_of(x[0]) == "bfloat16" for x in found.states) else {}


def shard_seed(seed: int, param: Tensor) -> int:
    """Return a seed of the part of a parameter that this rank holds; replicas have the same.

    Args:
        seed: of the parameter; that of a first part, and of a plain parameter.
        param: as the optimizer holds it.
    """
    return (seed + shard_index(param) * _APART) % 2**64
