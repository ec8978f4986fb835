"""Checks of single numbers, worded alike in the whole room."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Protocol, TypeVar


class Arithmetic(Protocol):
    """What plain arithmetic accepts: a float, an array, a tensor."""

    def __add__(self, other: Any, /) -> Any:
        """Return the sum."""

    def __sub__(self, other: Any, /) -> Any:
        """Return the difference."""

    def __mul__(self, other: Any, /) -> Any:
        """Return the product."""

    def __truediv__(self, other: Any, /) -> Any:
        """Return the quotient."""


Quantity = TypeVar("Quantity", bound=Arithmetic)


def require_number(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {type(value).__name__}; "
            "convert tensors and strings with float() first"
        )


def require_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    require_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} is not allowed; it must be finite and above 0")


def require_non_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number of at least 0."""
    require_number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} is not allowed; it must be finite and at least 0")


def require_fraction(name: str, value: float) -> None:
    """Raise unless ``value`` is a number in [0, 1]."""
    require_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not allowed; it must lie between 0 and 1")


def require_count(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value} is not allowed; it must be at least 1")
