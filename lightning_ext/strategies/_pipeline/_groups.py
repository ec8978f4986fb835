"""Groups of ranks, and values that they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DeviceMesh


def make_mesh(replicas: int, device: torch.device, timeout: timedelta | None) -> DeviceMesh:
    """Makes a mesh (data_parallel, pipeline) of all ranks; all must call.

    Its groups are made here, as those of ``init_device_mesh`` would not wait as the default group.

    Args:
        replicas: Of a pipeline; they divide the ranks.
        device: Of its collectives.
        timeout: Of these; ``None`` is torch's.
    """
    ranks = torch.arange(dist.get_world_size()).view(replicas, -1)
    groups = [
        dist.new_subgroups_by_enumeration(rows.tolist(), timeout)[0] for rows in (ranks.T, ranks)
    ]
    names = ("data_parallel", "pipeline")
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)


def limit_waiting(groups: Iterable[dist.ProcessGroup], timeout: timedelta | None) -> None:
    """Has groups wait no longer than the default group; torch gives them times of their own.

    Args:
        groups: Of this rank.
        timeout: Of a collective; ``None`` leaves torch's.
    """
    if timeout is None:
        return
    for group in dict.fromkeys(groups):
        _set_pg_timeout(timeout, group)


def reduced(
    reduce: Callable[..., Any], pipeline_ranks: int, value: Any, group: Any, reduce_op: Any
) -> Any:
    """Reduces a value over all ranks, those of a pipeline being one.

    Args:
        reduce: Lightning's, over the default group or another.
        pipeline_ranks: Of a pipeline; the mean of their values counts.
        value: A tensor, or something else, which is left as it is.
        group: Of ranks, if not all.
        reduce_op: ``"mean"``, ``"sum"``, …
    """
    found = reduce(value, group, reduce_op)
    is_sum = reduce_op == dist.ReduceOp.SUM or str(reduce_op).lower() == "sum"
    if group is None and is_sum and isinstance(found, Tensor):
        found = (found / pipeline_ranks).to(found.dtype)
    return found
