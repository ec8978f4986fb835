"""A DeepSpeed config out of Lightning's defaults, what the user wrote, and typed options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

Config = dict[str, Any]
_STAGE = (
    "ZeRO++ refines stage 3, the only one allowed. Hint: leave it out, or"
    " Trainer(strategy='deepspeed_stage_2')."
)


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """Returns the defaults with what was given in its places, section by section.

    Neither argument is changed, and the result shares no dict or list with them.

    Example:
        >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    result = copy.deepcopy(dict(defaults))
    for key, value in given.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def check_stage(stage: int, others: Mapping[str, Any]) -> None:
    """Refuses arguments for another stage than 3.

    Args:
        stage: What was set.
        others: The other arguments of Lightning's strategy.

    Raises:
        MisconfigurationException: With the stage.
    """
    zero_optimization = others.get("zero_optimization", True)
    if stage != 3 or not zero_optimization:
        raise MisconfigurationException(
            f"stage={stage} and zero_optimization={zero_optimization} were set; {_STAGE}"
        )


def check_given(
    given: Mapping[str, Any], options: Mapping[str, Any], others: Mapping[str, Any]
) -> None:
    """Refuses a user's config that says something else than the arguments beside it.

    Args:
        given: The config.
        options: Arguments that were set, by their keys in the section ``zero_optimization``.
        others: Lightning's arguments. A default says nothing: a LightningCLI passes those too.

    Raises:
        MisconfigurationException: With both values.
    """
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise MisconfigurationException(
            f"zero_optimization={zero!r} in the DeepSpeed config; allowed is a section of settings."
            " Hint: leave it out, stage 3 and Lightning's defaults are filled in."
        )
    if zero.get("stage", 3) != 3:
        raise MisconfigurationException(
            f"zero_optimization.stage is {zero['stage']!r} in the DeepSpeed config; {_STAGE}"
        )
    lightnings = signature(DeepSpeedStrategy).parameters
    set_here = {key: x for key, x in others.items() if x != lightnings[key].default}
    for key, option in {**options, **set_here}.items():
        if zero.get(key, option) != option:
            raise MisconfigurationException(
                f"{key} is {zero[key]!r} in the section zero_optimization of the DeepSpeed config,"
                f" and {option!r} as an argument. Hint: set it in one of the two places."
            )
