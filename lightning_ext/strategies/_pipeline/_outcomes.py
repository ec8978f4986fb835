"""Errors of one rank that all ranks raise, before any of them waits for the others."""

from __future__ import annotations

import logging
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
# Where no line of a user's is: Python, what is installed, and this package.
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (*map(sysconfig.get_path, _PATHS), str(Path(__file__).parents[2]))
)

_SCHEDULES = logging.getLogger("torch.distributed.pipelining.schedules")
_WRAPPED = re.compile(r"failed to run (forward|stage backward)", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank.

    Args:
        what: In words.
        where: On which rank and stage.
        cause: The error; other ranks do not get it.
    """

    what: str
    where: str
    cause: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves out the error, which may not pickle."""
        return Failure, (self.what, self.where)


def attempt(where: str, call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or the failure in its place.

    Args:
        where: On which rank and stage it runs.
        call: Of a user's code, which may raise anything.
    """
    try:
        return call()
    except Exception as error:  # raised again, on all ranks
        name = "" if isinstance(error, MisconfigurationException) else f"{type(error).__name__}: "
        line = _users_line(error)
        return Failure(f"{name}{error}", f"{line}; {where}" if line else where, error)


def _users_line(error: Exception) -> str:
    """The innermost line of a user's own code that the error has come through."""
    lines = [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*_LIBRARIES, "<frozen"))
    ]
    return lines[-1] if lines else ""


@contextmanager
def as_raised() -> Iterator[None]:
    """Has errors of layers come out of torch's schedules as they were raised, and alone.

    Raises:
        Exception: A layer's.
    """
    level = _SCHEDULES.level
    _SCHEDULES.setLevel(logging.CRITICAL)  # it would print the whole schedule with each error
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is None or not _WRAPPED.search(str(error)):
            raise
        raise error.__cause__ from None
    finally:
        _SCHEDULES.setLevel(level)


def require_success(outcome: object, group: dist.ProcessGroup | None = None) -> None:
    """Raises on all ranks what went wrong on any.

    Args:
        outcome: A :class:`Failure`, or anything else.
        group: All of its ranks must call; ``None``: all ranks.

    Raises:
        MisconfigurationException: A rank failed.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, outcome if isinstance(outcome, Failure) else None, group=group)
    raise_first(found, outcome)


def raise_first(outcomes: Sequence[Any], own: object = None) -> None:
    """Raises the first failure.

    Args:
        outcomes: Of all ranks, the same on all.
        own: Of this rank; its error is the cause.

    Raises:
        MisconfigurationException: There is one.
    """
    for one in outcomes:
        if isinstance(one, Failure):
            cause = own.cause if isinstance(own, Failure) else None
            raise MisconfigurationException(f"{one.what} ({one.where})") from cause
