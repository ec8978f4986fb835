"""Arguments of the strategies on FSDP2, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

from lightning_ext.strategies._nodes import check_ranks

T = TypeVar("T")


class Rule(NamedTuple):
    """What an argument may be: a test, the same in words, and a hint."""

    is_met: Callable[[Any], bool]
    allowed: str
    hint: str


def _is_wrap(value: object) -> bool:
    if value is None or isinstance(value, (str, ModuleWrapPolicy, CustomPolicy)):
        return True
    if isinstance(value, Collection):
        return all(_is_class(one) for one in value)
    return _is_class(value) or (callable(value) and not isinstance(value, (type, nn.Module)))


def _is_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


_RULES = {
    "wrap": Rule(
        _is_wrap,
        "'transformer_layers', the name of a class, classes of modules, a policy of"
        " torch.distributed.fsdp.wrap, a function of a module, None",
        "one class by its name, several as classes.",
    ),
    "mp_policy": Rule(
        lambda x: x is None or isinstance(x, MixedPrecisionPolicy),
        "a torch.distributed.fsdp.MixedPrecisionPolicy, None",
        "MixedPrecisionPolicy(param_dtype=torch.bfloat16), or Trainer(precision='bf16-mixed').",
    ),
    "offload_policy": Rule(
        lambda x: x is None or isinstance(x, OffloadPolicy),
        "a torch.distributed.fsdp.OffloadPolicy, None",
        "CPUOffloadPolicy() of torch.distributed.fsdp.",
    ),
    "timeout": Rule(
        lambda x: x is None or isinstance(x, timedelta),
        "a datetime.timedelta, None",
        "timedelta(seconds=30).",
    ),
}
_SWITCH = Rule(lambda x: isinstance(x, bool), "True, False", "without quotes in YAML.")
_RANKS: dict[str, dict[str, Any]] = {
    "ranks_per_node": {"least": 1, "others": ("auto",)},
    "reshard_after_forward": {"least": 2, "others": (True, False)},
}


def checked(name: str, value: T) -> T:
    """Returns an argument as it is.

    Args:
        name: Of the argument; those without a rule here are switches.
        value: As the user gave it.

    Raises:
        TypeError: It is of another kind, with what is allowed.
        ValueError: A number of ranks that is too small.
    """
    if name in _RANKS:
        check_ranks(name, value, **_RANKS[name])
        return value
    require(name, value, _RULES.get(name, _SWITCH))
    return value


def require(name: str, value: object, rule: Rule) -> None:
    """Refuses what a rule does not allow.

    Args:
        name: Of the argument.
        value: As the user gave it.
        rule: Of it.

    Raises:
        TypeError: With what is allowed.
    """
    if not rule.is_met(value):
        raise TypeError(f"{name} was {value!r}; allowed is {rule.allowed}. Hint: {rule.hint}")
