"""Stages of which several replicas see different data.

Differs: not torch's DDP, which waits for parameters that no micro-batch has used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh
from torch.nn import Parameter

from lightning_ext.strategies._pipeline._shared import Reduction

DataParallel = Literal["fsdp2", "ddp"]


class Replica(nn.Module):
    """A stage of which each rank holds all; gradients are averaged once a batch, in one piece.

    Args:
        stage: The stage.
        mesh: Of the ranks that have it.
        left: Parameters that others reduce.
    """

    def __init__(self, stage: nn.Module, mesh: DeviceMesh, left: Collection[Parameter]) -> None:
        super().__init__()
        self.stage = stage
        self._group, self._replicas = mesh.get_group(), mesh.size()
        self._own = [p for p in stage.parameters() if p not in left]
        self._running: list[Reduction] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the stage."""
        return self.stage(*args, **kwargs)

    def start(self) -> None:
        """Sends gradients, and does not wait."""
        trained: dict[torch.dtype, list[Parameter]] = defaultdict(list)
        for one in self._own:
            if one.requires_grad:
                trained[one.dtype].append(one)
        for members in trained.values():
            self._running.append(Reduction(members, self._group, self._replicas))

    def finish(self) -> None:
        """Has the means in their place."""
        while self._running:
            self._running.pop(0).finish()


def replicate(
    stage: nn.Module,
    how: DataParallel,
    mesh: DeviceMesh,
    shared: Collection[Parameter],
    mp_policy: MixedPrecisionPolicy,
) -> nn.Module:
    """Makes a stage one of a data-parallel group.

    Args:
        stage: With whole parameters.
        how: ``"fsdp2"``: each rank holds a part of each parameter, and the stage is gathered by one
            collective; ``"ddp"``: whole ones.
        mesh: Of the group.
        shared: Parameters that are left as they are, for others to reduce.
        mp_policy: Of FSDP2.

    Returns:
        The stage, or a :class:`Replica` around it.
    """
    left = {p for p in stage.parameters() if p in set(shared)}
    if how == "fsdp2":
        fully_shard(
            stage, mesh=mesh, reshard_after_forward=False, ignored_params=left, mp_policy=mp_policy
        )
        return stage
    return Replica(stage, mesh, left)


def align(values: Collection[Tensor], group: dist.ProcessGroup) -> None:
    """Gives replicas the values of the first one.

    Args:
        values: Whole parameters and buffers of this rank.
        group: Ranks with the same stages.
    """
    for one in values:
        dist.broadcast(one.data, dist.get_global_rank(group, 0), group=group)
