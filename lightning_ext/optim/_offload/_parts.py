"""The tensors of a parameter's state that are worth a place in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

Path = tuple[Any, str | None]  # name of a state, and of a field where that is a named tuple


def parts(state: Mapping[Any, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors of a state that are offloaded, by name and field.

    Those of no dimension, such as counts of steps, stay where they are, and so do empty ones.

    Args:
        state: of a parameter.
    """
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.dim() and value.numel():
                yield (name, None), value
        elif isinstance(value, tuple):
            for field in getattr(value, "_fields", ()):
                part = getattr(value, field)
                if isinstance(part, Tensor) and part.dim() and part.numel():
                    yield (name, field), part


def replace(state: MutableMapping[Any, Any], found: Mapping[Path, Tensor]) -> None:
    """Put other tensors into a state.

    Args:
        state: of a parameter.
        found: tensors by name and field.
    """
    for (name, field), tensor in found.items():
        state[name] = tensor if field is None else state[name]._replace(**{field: tensor})


def to_host(state: MutableMapping[Any, Any]) -> None:
    """Move the tensors of a state to host memory, where the device waits for them.

    Args:
        state: of a parameter.
    """
    replace(state, {path: x.cpu() for path, x in parts(state) if not x.is_cpu})


class HostStates(MutableMapping[Tensor, Any]):
    """States by parameter, read when they are home; what is put into them goes there.

    Args:
        states: returns the optimizer's, when no copy of them is under way.
    """

    def __init__(self, states: Callable[[], MutableMapping[Tensor, Any]]) -> None:
        self._states = states

    def __getitem__(self, param: Tensor) -> Any:
        return _HostState(self._states()[param])

    def __setitem__(self, param: Tensor, state: Any) -> None:
        found = self._states()[param] = dict(state)
        to_host(found)

    def __delitem__(self, param: Tensor) -> None:
        del self._states()[param]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._states())

    def __len__(self) -> int:
        return len(self._states())

    def __contains__(self, param: object) -> bool:
        return param in self._states()

    def get(self, param: Tensor, default: Any = None) -> Any:
        """Return the state of a parameter, and make none."""
        states = self._states()
        return _HostState(states[param]) if param in states else default


class _HostState(MutableMapping[Any, Any]):
    """The state of a parameter, likewise: Lightning moves what it has loaded to the device."""

    def __init__(self, state: MutableMapping[Any, Any]) -> None:
        self._state = state

    def __getitem__(self, name: Any) -> Any:
        return self._state[name]

    def __setitem__(self, name: Any, value: Any) -> None:
        self._state[name] = value
        to_host(self._state)

    def __delitem__(self, name: Any) -> None:
        del self._state[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        return repr(self._state)
