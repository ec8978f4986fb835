"""Ranks as threads of one process, for collectives whose arithmetic is under test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ext.strategies import NodeGroups


class ThreadGroup:
    """What a collective asks of a process group."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(len(ranks), timeout=30)
        self._sent: dict[int, Tensor] = {}

    def size(self) -> int:
        return len(self.ranks)

    def all_to_all(self, rank: int, received: Tensor, sent: Tensor) -> None:
        place = self.ranks.index(rank)
        self._sent[place] = sent
        self._barrier.wait()
        parts = [self._sent[k].chunk(self.size())[place] for k in range(self.size())]
        received.copy_(torch.cat(parts))
        self._barrier.wait()


class ThreadRanks:
    """So many ranks on nodes; `monkeypatch` gives them torch's functions for as long as it lasts.

    Attributes:
        sent_bytes: For each rank, of its all-to-alls in order.
    """

    def __init__(self, world: int, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.ranks_per_node = world, ranks_per_node
        self.sent_bytes: list[list[int]] = [[] for _ in range(world)]
        self.group = ThreadGroup(tuple(range(world)))
        nodes = range(world // ranks_per_node)
        inside = [range(n * ranks_per_node, (n + 1) * ranks_per_node) for n in nodes]
        across = [range(k, world, ranks_per_node) for k in range(ranks_per_node)]
        self._inside = [ThreadGroup(tuple(x)) for x in inside]
        self._across = [ThreadGroup(tuple(x)) for x in across]
        self._current = threading.local()
        monkeypatch.setattr(dist, "get_rank", lambda: self._current.rank)
        monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(group.ranks))
        monkeypatch.setattr(dist, "all_to_all_single", self._all_to_all)

    def node_groups(self, rank: int) -> NodeGroups:
        k = self.ranks_per_node
        local: Any = self._inside[rank // k] if k > 1 or k == self.world else None
        across: Any = self._across[rank % k] if k < self.world else None
        return NodeGroups(self.group.ranks, k, local, across)

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """Call `fn` with each rank and return the results."""

        def call(rank: int) -> Any:
            self._current.rank = rank
            return fn(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(call, range(self.world)))

    def _all_to_all(self, received: Tensor, sent: Tensor, group: ThreadGroup) -> None:
        rank = self._current.rank
        self.sent_bytes[rank].append(sent.nbytes)
        group.all_to_all(rank, received, sent)
