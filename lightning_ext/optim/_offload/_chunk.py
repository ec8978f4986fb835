"""States of some parameters, side by side in host memory: one copy for each dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ext.optim._offload._parts import Path, parts, replace

Views = dict[Tensor, dict[Path, Tensor]]
_ALIGNED = 256  # bytes, as memory of its own would be


class _Place(NamedTuple):
    param: Tensor
    path: Path
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    start: int  # in entries of the dtype's memory


class Chunk:
    """Host memory for the states of some parameters, into which they are moved.

    Args:
        states: of each parameter; their tensors become views of the chunk's memory.
        pinned: whether a device copies from and to it by itself.

    Attributes:
        home: the views, by parameter, name and field.
        nbytes: of a buffer that holds all of it.
    """

    def __init__(self, states: Mapping[Tensor, dict[Any, Any]], *, pinned: bool) -> None:
        self._places, lengths = _places(states)
        self._host = {
            dtype: torch.zeros(length, dtype=dtype, pin_memory=pinned)
            for dtype, length in lengths.items()
        }
        self.nbytes = sum(x.nbytes for x in self._host.values())
        self._staged: dict[int, tuple[Tensor, Views]] = {}
        self.home = self._views(self._host)
        for param, state in states.items():
            for path, tensor in parts(state):
                self.home[param][path].copy_(tensor)
            replace(state, self.home[param])

    def is_home(self, param: Tensor, state: Mapping[Any, Any]) -> bool:
        """Return whether a parameter's states are the views, and nothing else."""
        home = self.home[param]
        found = dict(parts(state))
        return found.keys() == home.keys() and all(found[path] is x for path, x in home.items())

    def pairs(self, buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what is copied: parts of a buffer, and the host memory of each."""
        cut = self._cut(buffer)
        return [(cut[dtype], host) for dtype, host in self._host.items()]

    def staged(self, slot: int, buffer: Tensor) -> Views:
        """Return the views in a buffer.

        Args:
            slot: which of the buffers it is.
            buffer: of bytes.
        """
        known = self._staged.get(slot)
        if known is None or known[0] is not buffer:
            known = self._staged[slot] = buffer, self._views(self._cut(buffer))
        return known[1]

    def _cut(self, buffer: Tensor) -> dict[torch.dtype, Tensor]:
        found, start = {}, 0
        for dtype, host in self._host.items():
            found[dtype] = buffer[start : start + host.nbytes].view(dtype)
            start += host.nbytes
        return found

    def _views(self, memory: Mapping[torch.dtype, Tensor]) -> Views:
        views: Views = {}
        for param, path, dtype, shape, strides, start in self._places:
            # From the memory's own offset on: it may be a part of a buffer.
            offset = memory[dtype].storage_offset() + start
            view = memory[dtype].as_strided(shape, strides, offset)
            views.setdefault(param, {})[path] = view
        return views


def state_bytes(state: Mapping[Any, Any]) -> int:
    """Return the bytes of what is offloaded of a state."""
    return sum(x.nbytes for _, x in parts(state))


def _places(
    states: Mapping[Tensor, dict[Any, Any]],
) -> tuple[list[_Place], dict[torch.dtype, int]]:
    places: list[_Place] = []
    lengths: dict[torch.dtype, int] = {}
    for param, state in states.items():
        for path, tensor in parts(state):
            start = lengths.get(tensor.dtype, 0)
            strides = torch.empty_like(tensor, device="meta").stride()  # dense, in its order
            place = _Place(param, path, tensor.dtype, tensor.shape, strides, start)
            step = _ALIGNED // tensor.element_size()
            lengths[tensor.dtype] = start + -(-tensor.numel() // step) * step
            places.append(place)
    return places, lengths
