"""What the groups of an optimizer may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from inspect import Parameter, signature
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_ext.optim._low_bit._bitsandbytes import require_bitsandbytes
from lightning_ext.optim._low_bit._moments import STATE_DTYPES, WEIGHT_ROUNDINGS

T = TypeVar("T", bound=Optimizer)


class Range(NamedTuple):
    """Values that a setting may have.

    Attributes:
        holds: tells of a number whether it is one of them.
        words: the same, after "must".
    """

    holds: Callable[[float], bool]
    words: str


AT_LEAST_0 = Range(lambda x: 0 <= x < math.inf, "be finite and at least 0")
ABOVE_0 = Range(lambda x: 0 < x < math.inf, "be finite and above 0")
SHARE = Range(lambda x: 0 <= x < 1, "lie in [0, 1)")
UP_TO_1 = Range(lambda x: 0 <= x <= 1, "lie in [0, 1]")
SEED = Range(lambda x: isinstance(x, int) and 0 <= x < 2**64, "be a whole number in [0, 2**64)")

_RANGES: dict[str, Range] = {
    "lr": AT_LEAST_0,
    "betas": SHARE,
    "momentum": SHARE,
    "dampening": UP_TO_1,
    "eps": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "min_quantized_numel": AT_LEAST_0,
    "seed": Range(
        lambda x: isinstance(x, int) and 0 <= x < 2**64, "be a whole number in [0, 2**64)"
    ),
}


_FLAGS = (
    *("maximize", "nesterov", "decoupled_weight_decay", "trust_ratio", "bias_correction"),
    *("larc", "lr_in_momentum"),
)
_CHOICES = ("foreach", "fused")
_NAMES: dict[str, tuple[str | None, ...]] = {
    "state_dtype": STATE_DTYPES,
    "weight_rounding": WEIGHT_ROUNDINGS,
    "backend": (None, "bitsandbytes"),
}


def check_groups(
    optimizer: Optimizer, ranges: Mapping[str, Range] | None = None, *, shared: Sequence[str] = ()
) -> None:
    """Refuse settings out of range and parameters that cannot be updated, group by group.

    Args:
        optimizer: with its groups.
        ranges: of settings of its own, by name; lr, betas, momentum, dampening, eps and
            weight_decay have theirs. ``None`` is allowed where the class says so.
        shared: settings that are of the whole optimizer and the same in all groups.

    Raises:
        ValueError: if a setting is out of range, an lr has several entries, or a group has a value
            of its own of what is shared.
        TypeError: if a parameter is complex, or no floating point tensor.
    """
    for index, group in enumerate(optimizer.param_groups):
        check_group(optimizer, index, group, ranges)
        for name in shared:
            if group[name] != optimizer.param_groups[0][name]:
                raise ValueError(
                    f"{type(optimizer).__name__} got {name}={group[name]!r} in group {index} and"
                    f" {optimizer.param_groups[0][name]!r} elsewhere; it is one for all groups"
                )


def checks_groups(ranges: Mapping[str, Range] | None = None) -> Callable[[type[T]], type[T]]:
    """Return a decorator by which a class of optimizers refuses a wrong group as it is added.

    Args:
        ranges: as in ``check_groups``.
    """

    def decorate(kind: type[T]) -> type[T]:
        add = kind.add_param_group

        @wraps(add)
        def add_param_group(self: T, param_group: dict[str, Any]) -> None:
            present = len(self.param_groups)
            with ExitStack() as undo:
                undo.callback(self.param_groups.__delitem__, slice(present, None))
                add(self, param_group)
                check_group(self, present, self.param_groups[present], ranges)
                undo.pop_all()

        vars_of: Any = kind
        vars_of.add_param_group = add_param_group
        return kind

    return decorate


def check_group(
    optimizer: Optimizer,
    index: int,
    group: dict[str, Any],
    ranges: Mapping[str, Range] | None = None,
) -> None:
    """Refuse what ``check_groups`` refuses, of one group.

    Args:
        optimizer: whose group it is.
        index: of the group.
        group: the group.
        ranges: as in ``check_groups``.
    """
    where = type(optimizer).__name__
    place = f" in group {index}" if len(optimizer.param_groups) > 1 else ""
    own = signature(type(optimizer)).parameters
    for name, allowed in {**_RANGES, **(ranges or {})}.items():
        if name in group and not _fits(group[name], allowed, own.get(name)):
            raise ValueError(f"{where} got {name}={group[name]!r}{place}; it must {allowed.words}")
    for name in (*_FLAGS, *_CHOICES):
        known = (True, False, None) if name in _CHOICES else (True, False)
        if name in group and not any(group[name] is x for x in known):
            raise ValueError(
                f"{where} got {name}={group[name]!r}{place}; it must be one of {known}"
            )
    for name, names in _NAMES.items():
        if name in group and group[name] not in names:
            raise ValueError(f"{where} got {name}={group[name]!r}{place}; choose one of {names}")
    backend, paged = group.get("backend"), group.get("paged", False)
    if backend or paged:
        require_bitsandbytes(where, backend, group["state_dtype"], paged=paged)
        _refuse_beside_bitsandbytes(where, group)
    for i, parameter in enumerate(group["params"]):
        if not parameter.is_floating_point():
            named = group.get("param_names", [])
            name = repr(named[i]) if named else f"parameter {i} of group {index}"
            raise TypeError(
                f"{where} does not take {parameter.dtype}, as {name} is, but floating point; give a"
                " complex parameter as torch.view_as_real of it"
            )


def _refuse_beside_bitsandbytes(where: str, group: dict[str, Any]) -> None:
    for name, value in (("weight_rounding", "nearest"), ("decoupled_weight_decay", True)):
        if group.get(name, value) != value:
            raise ValueError(
                f"{where} got {name}={group[name]!r} with backend='bitsandbytes', whose step has"
                f" {name}={value!r} alone. Hint: leave backend out"
            )


def _fits(value: Any, allowed: Range, argument: Parameter | None) -> bool:
    """Whether a setting may have a value; one that is none of the class's own is another's."""
    default = None if argument is None else argument.default
    if value is None:
        return argument is None or "None" in str(argument.annotation)
    if isinstance(default, tuple):
        of_all = isinstance(value, (tuple, list)) and len(value) == len(default)
        return of_all and all(_holds(x, allowed) for x in value)
    if isinstance(value, (tuple, list)):
        return default is None and all(x is None or _holds(x, allowed) for x in value)
    return _holds(value, allowed) or (argument is None and isinstance(value, bool))


def _holds(value: Any, allowed: Range) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and (not value.is_cpu or allowed.holds(float(value)))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and allowed.holds(value)
