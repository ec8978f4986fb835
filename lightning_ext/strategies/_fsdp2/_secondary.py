"""One mesh for the copies that units keep between their forward and their backward pass.

Private: ``_get_fsdp_state()`` of torch's ``FSDPModule``; its ``_fsdp_param_groups`` (one
    ``_fsdp_param_group`` before torch 2.13), and ``post_forward_mesh_info`` and ``mesh_info`` of
    these and of their ``fsdp_params``; ``_set_pg_timeout``.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule


def share_secondary_mesh(units: Iterable[FSDPModule]) -> None:
    """Has all units use the process groups of the first one.

    ``fully_shard`` with an integer makes groups of ranks for every unit anew, each of which would
    hold a communicator and its memory. They are all alike.

    Args:
        units: On the same ranks, sharded with the same ``reshard_after_forward``.
    """
    shared: Any = None
    for group in (group for unit in units for group in _groups(unit)):
        own = group.post_forward_mesh_info
        if own is None or own is group.mesh_info:
            continue
        if shared is None:
            shared = own
        elif own is not shared:
            for holder in (group, *group.fsdp_params):
                holder.post_forward_mesh_info = shared
            for process_group in own.mesh.get_all_groups():
                dist.destroy_process_group(process_group)


def limit_waiting(units: Iterable[FSDPModule], timeout: timedelta | None) -> None:
    """Has the groups of meshes wait no longer than the default group; torch gives them its own.

    Args:
        units: Whose meshes are meant.
        timeout: Of a collective; ``None`` leaves torch's.
    """
    if timeout is None:
        return
    found = [group for unit in units for group in _groups(unit)]
    infos = [info for one in found for info in (one.mesh_info, one.post_forward_mesh_info)]
    groups = [x for info in infos if info is not None for x in info.mesh.get_all_groups()]
    for group in dict.fromkeys(groups):
        _set_pg_timeout(timeout, group)


def _groups(unit: Any) -> list[Any]:
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in (state._fsdp_param_group,) if group is not None]
