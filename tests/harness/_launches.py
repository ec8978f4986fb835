"""What is launched, interpreted or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def launches(*, run: bool = True) -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched inside.

    Args:
        run: whether they do their work.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from lightning_ext.kernels._triton._interpret import INTERPRETED

    kind: Any = InterpretedFunction if INTERPRETED else JITFunction
    found: list[str] = []
    launch = kind.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.fn.__name__)
        return launch(self, *args, **kwargs) if run else None

    kind.run = recorded
    try:
        yield found
    finally:
        kind.run = launch
