"""Puts back, in place, what tensors and plain containers held."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

_CONTAINERS = (dict, list, set, deque)


class Snapshot:
    """Remembers the contents of everything that dicts, lists, sets, deques and tuples lead to.

    Tensors are copied to host memory, so that a device needs no room for them. Other objects are
    remembered by reference: what happens inside them is not undone.

    Args:
        roots: Where to begin; ``vars(module)`` for the attributes of a module.
    """

    def __init__(self, *roots: Any) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        waiting = list(roots)
        while waiting:
            value = waiting.pop()
            if id(value) in self._contents:
                continue
            if isinstance(value, _CONTAINERS):
                inner = list(value.values() if isinstance(value, dict) else value)
                self._contents[id(value)] = value, dict(value) if isinstance(value, dict) else inner
                waiting += inner
            elif isinstance(value, tuple):
                waiting += value
            elif isinstance(value, Tensor) and _can_be_written(value):
                self._contents[id(value)] = value, value.detach().to("cpu", copy=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes everything back; may be called again."""
        for value, content in self._contents.values():
            if isinstance(value, Tensor):
                value.copy_(content)
                continue
            value.clear()
            if isinstance(value, (list, deque)):
                value.extend(content)
            else:
                value.update(content)


def _can_be_written(tensor: Tensor) -> bool:
    """Whether in-place writing is allowed: not in a graph, no element that stands for several."""
    expanded = any(n > 1 and s == 0 for n, s in zip(tensor.shape, _strides(tensor), strict=True))
    return tensor.grad_fn is None and not expanded and not tensor.is_meta


def _strides(tensor: Tensor) -> tuple[int, ...]:
    strided = tensor.layout == torch.strided
    return tensor.stride() if strided else (1,) * tensor.ndim
