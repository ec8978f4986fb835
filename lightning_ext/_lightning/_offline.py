"""Keeps the collectives of a step that only one rank may take from reaching the others.

Private: of torch, ``distributed_c10d._world``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def offline() -> Iterator[None]:
    """Puts a group in the place of the default one that talks to nobody.

    Its collectives return at once, with results of the right shape that mean nothing. Groups that
    are named explicitly are not replaced.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    world: Any = dist.distributed_c10d._world
    real = world.default_pg
    silent = _silent_group(dist.get_rank(), dist.get_world_size())
    tables = (world.pg_map, world.pg_group_ranks, world.pg_backend_config, world.pg_names)
    for table in tables:
        table[silent] = table[real]
    world.pg_names[silent] = silent.group_name
    world.default_pg = silent
    try:
        yield
    finally:
        world.default_pg = real
        for table in tables:
            del table[silent]


def _silent_group(rank: int, size: int) -> dist.ProcessGroup:
    from torch._C._distributed_c10d import FakeProcessGroup

    group: Any = dist.ProcessGroup(dist.HashStore(), rank, size)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    for device in ("cpu", "cuda"):
        backend = FakeProcessGroup._create_internal(rank, size)
        group._register_backend(torch.device(device), kind, backend)
    group._set_group_name("trial")
    silent: dist.ProcessGroup = group
    return silent
