"""Checks of single arguments, each with the value that was set and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def require_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Refuses what is no integer of at least ``least``.

    Raises:
        TypeError: Not an integer (``True`` is none either).
        ValueError: Too small.
    """
    if optional and value is None:
        return
    allowed = f"an integer of at least {least}" + (", or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} was {value!r}; allowed is {allowed}.")
    if value < least:
        raise ValueError(f"{name} was {value!r}; allowed is {allowed}.")


def require_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuses what is no finite number in a range; ``least`` and ``most`` belong to it.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range.
    """
    limits = {"above": above, "at least": least, "at most": most, "below": below}
    stated = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    allowed = f"a number {' and '.join(stated)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} was {value!r}; allowed is {allowed}.")
    if not (above < value < below and least <= value <= most):
        raise ValueError(f"{name} was {value!r}; allowed is {allowed}.")


def require_bool(name: str, value: Any) -> None:
    """Refuses what is neither ``True`` nor ``False``.

    Raises:
        TypeError: Something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} was {value!r}; allowed is True or False.")


def require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses what is not among the choices.

    Raises:
        ValueError: Another value.
    """
    if value not in allowed:
        raise ValueError(f"{name} was {value!r}; allowed are {allowed}.")
