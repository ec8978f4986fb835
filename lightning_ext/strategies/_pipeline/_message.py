"""Losses and logged values from the last rank of a pipeline to the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_HEADER = 2  # how often the layout changed, and how many values follow


class _Slot(NamedTuple):
    key: Any
    dtype: torch.dtype


class Message:
    """One tensor a batch; what stands where in it is told when it changes.

    Args:
        group: The pipeline's ranks; its last one sends.
        device: Of the tensor.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._source = dist.get_global_rank(group, dist.get_world_size(group) - 1)
        self._slots: list[_Slot] = []
        self._version, self._room = 0, 64

    def send(
        self, values: dict[Any, Tensor], extra: dict[Any, Any]
    ) -> dict[Any, tuple[Tensor, Any]]:
        """Sends single numbers by key; the last rank calls.

        Args:
            values: Tensors of one element.
            extra: By key, what seldom changes and needs no tensor.

        Returns:
            What :meth:`receive` returns on the others.
        """
        slots = [_Slot((key, extra.get(key)), value.dtype) for key, value in values.items()]
        if changed := slots != self._slots:
            self._slots, self._version = slots, self._version + 1
        header = torch.tensor([float(self._version), float(len(slots))], dtype=torch.float64)
        numbers = [value.detach().double().reshape(1) for value in values.values()]
        body = torch.cat([header.to(self._device), *numbers])
        fixed = torch.zeros(self._room, dtype=torch.float64, device=self._device)
        fixed[: min(len(body), self._room)] = body[: self._room]
        dist.broadcast(fixed, self._source, group=self._group)
        if changed:
            dist.broadcast_object_list([slots], self._source, group=self._group)
        if len(body) > self._room:
            self._room = 2 * len(body)
            dist.broadcast(body, self._source, group=self._group)
        return self._read(body)

    def receive(self) -> dict[Any, tuple[Tensor, Any]]:
        """The numbers of the last rank by key, with what belongs to them; the other ranks call."""
        body = torch.zeros(self._room, dtype=torch.float64, device=self._device)
        dist.broadcast(body, self._source, group=self._group)
        version, count = (int(x) for x in body[:_HEADER].tolist())
        if version != self._version:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, self._source, group=self._group)
            self._slots, self._version = told[0], version
        if _HEADER + count > self._room:
            body = torch.zeros(_HEADER + count, dtype=torch.float64, device=self._device)
            dist.broadcast(body, self._source, group=self._group)
            self._room = 2 * len(body)
        return self._read(body)

    def _read(self, body: Tensor) -> dict[Any, tuple[Tensor, Any]]:
        numbers = body[_HEADER : _HEADER + len(self._slots)]
        return {
            slot.key[0]: (number.to(slot.dtype), slot.key[1])
            for slot, number in zip(self._slots, numbers, strict=True)
        }
