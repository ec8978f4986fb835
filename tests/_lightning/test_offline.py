"""A step that only one rank takes may call collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from harness import run_distributed

from lightning_ext._lightning._offline import offline


def ranks_of_their_own() -> Any:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    shapes = []
    if rank == 0:  # rank 1 calls none of these
        with offline():
            value = torch.ones(2)
            dist.all_reduce(value)
            parts = [torch.zeros(2) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value)
            objects: list[Any] = [None, None]
            dist.all_gather_object(objects, {"rank": dist.get_rank()})
            dist.barrier()
            shapes = [tuple(part.shape) for part in parts]
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return total.item(), shapes


def test_collectives_return_at_once_and_work_again_afterwards() -> None:
    assert run_distributed(ranks_of_their_own) == [(3.0, [(2,), (2,)]), (3.0, [])]


def tables() -> Any:
    dist.init_process_group("gloo")
    dist.barrier()  # a rank that leaves while another connects would break its connection
    world = dist.distributed_c10d._world
    before = [len(table) for table in (world.pg_map, world.pg_names, world.pg_group_ranks)]
    real = dist.group.WORLD
    with offline():
        assert dist.group.WORLD is not real
    assert dist.group.WORLD is real
    return before, [len(table) for table in (world.pg_map, world.pg_names, world.pg_group_ranks)]


def test_nothing_is_left_of_it() -> None:
    for before, after in run_distributed(tables):
        assert before == after


def test_without_a_process_group_it_does_nothing() -> None:
    with offline():
        assert not dist.is_initialized()
