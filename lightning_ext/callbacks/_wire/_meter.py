"""Counts what this rank sends, at the operators of torch.distributed.

Source: torch's dispatch modes: every operator of a thread, and of the backward passes that it
    starts, comes by, collectives too, whether Python, FSDP2 or DDP's reducer in C++ calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ext.callbacks._arguments import require_count
from lightning_ext.callbacks._wire._collectives import (
    Operator,
    named_arguments,
    operator_of,
    place_of,
    sent_by,
)
from lightning_ext.callbacks._wire._count import Phase, Sent, WireCount


class WireMeter(TorchDispatchMode):
    """Counts bytes and messages that this rank sends inside of the ``with`` block.

    Bytes are those of ``scaling.collective_traffic``: every part of a buffer goes straight to the
    rank that needs it. What goes to ranks of another node counts as inter-node. Barriers do not
    count. Nothing is changed; each operator costs some microseconds of Python.

    Seen are collectives of this thread and of backward passes that it starts, also those in C++ of
    DDP, those of DTensors and those in compiled code. Not seen: other threads, collectives inside
    of a custom operator, calls of a backend that go past its process group, and memory that ranks
    share.

    Args:
        ranks_per_node: Ranks that share a node: those from k·ranks_per_node on are the node k.

    Raises:
        TypeError: Not an integer.
        ValueError: Below 1.

    Example:
        >>> with WireMeter(ranks_per_node=8) as meter:
        ...     y = torch.ones(2) + 1
        >>> meter.count.total.inter_bytes
        0
    """

    supports_higher_order_operators = True

    def __init__(self, ranks_per_node: int) -> None:
        require_count("ranks_per_node", ranks_per_node)
        super().__init__()
        self.ranks_per_node = ranks_per_node
        #: What is outside of a backward pass; backward passes are recognized.
        self.phase: Phase = "forward"
        #: Operators of torch.distributed that it saw and does not know.
        self.unknown: set[str] = set()
        self._sent: list[Sent] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled: its collectives come by one by one nevertheless."""
        return True

    @property
    def count(self) -> WireCount:
        """What has been sent so far."""
        return WireCount(tuple(self._sent))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Counts an operator, and calls it."""
        if types and any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it turns into operators of plain tensors, which come here
        kwargs = kwargs or {}
        operator = operator_of(func)
        if operator is not None:
            self._note(operator, named_arguments(func, args, kwargs))
        return func(*args, **kwargs)

    def _note(self, operator: Operator, named: Mapping[str, Any]) -> None:
        if operator.kind is None:
            self.unknown.add(operator.name)
            return
        place = place_of(named, self.ranks_per_node)
        in_backward = torch._C._current_graph_task_id() != -1
        phase: Phase = "backward" if in_backward else self.phase
        for traffic in sent_by(operator, named, place):
            self._sent.append(Sent(operator.kind, phase, place.size, traffic))
