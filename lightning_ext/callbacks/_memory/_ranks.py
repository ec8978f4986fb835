"""One rank of several in a process of its own, and which rows of parameters it holds.

Private: of torch, ``FakeProcessGroup``, ``distributed_c10d._world`` and where groups are found by
    name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


class Split(NamedTuple):
    """How FSDP2 shares parameters out.

    Attributes:
        ranks: That share.
        chosen: Identities of the parameters that are shared; ``None``: all.
    """

    ranks: int
    chosen: frozenset[int] | None = None

    def has(self, tensor: Tensor) -> bool:
        """Whether a parameter is shared; one without dimensions stays whole."""
        return tensor.ndim > 0 and (self.chosen is None or id(tensor) in self.chosen)

    def shape_of(self, tensor: Tensor) -> Sequence[int]:
        """Returns the part of a parameter that a rank has room for: its rows, rounded up."""
        shape = tuple(tensor.shape)
        return (-(-shape[0] // self.ranks), *shape[1:]) if self.has(tensor) else shape

    def held_by(self, rank: int, tensor: Tensor) -> Sequence[int]:
        """Returns the part that one rank holds; the last ones may have fewer rows, or none.

        Args:
            rank: Which.
            tensor: The parameter.
        """
        if not self.has(tensor):
            return tuple(tensor.shape)
        rows, *others = self.shape_of(tensor)
        return (min(rows, max(0, len(tensor) - rank * rows)), *others)


def shared(local: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Makes the DTensor of which a rank holds these rows.

    Args:
        local: What it holds.
        whole: Of the shape of all.
        mesh: The ranks.
    """
    size: dict[str, Any] = {"shape": whole.shape, "stride": local.stride()}
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **size)


@contextmanager
def one_of(ranks: int, rank: int) -> Iterator[DeviceMesh]:
    """Has this process be one rank of several, whose collectives return at once; then as before.

    A process group that is there already is put aside, and none of its ranks learns of it.

    Args:
        ranks: How many.
        rank: Which.

    Yields:
        The mesh of these ranks.
    """
    world: Any = dist.distributed_c10d._world
    real, silent = world.default_pg, _silent_group(ranks, rank)
    tables = {
        "pg_map": (dist.Backend("fake"), None),
        "pg_group_ranks": {i: i for i in range(ranks)},
        "pg_backend_config": "cpu:fake,cuda:fake",
        "pg_names": silent.group_name,
    }
    for name, value in tables.items():
        getattr(world, name)[silent] = value
    world.default_pg = silent
    torch._C._distributed_c10d._register_process_group(silent.group_name, silent)
    try:
        # DTensor remembers meshes by these names: none of a training may be taken for this one.
        yield DeviceMesh.from_group(silent, "cpu", mesh_dim_names=(silent.group_name,))
    finally:
        torch._C._distributed_c10d._unregister_process_group(silent.group_name)
        world.default_pg = real
        for name in tables:
            del getattr(world, name)[silent]


def _silent_group(ranks: int, rank: int) -> dist.ProcessGroup:
    from torch._C._distributed_c10d import FakeProcessGroup

    group: Any = dist.ProcessGroup(dist.HashStore(), rank, ranks)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    for device in ("cpu", "cuda"):
        backend = FakeProcessGroup._create_internal(rank, ranks)
        group._register_backend(torch.device(device), kind, backend)
    group._set_group_name(f"memory_plan_{rank}_of_{ranks}")
    found: dist.ProcessGroup = group
    return found
