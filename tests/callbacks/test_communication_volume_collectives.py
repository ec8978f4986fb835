"""Every collective against bytes counted by hand, on two nodes of two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from lightning_ext.callbacks import WireMeter
from lightning_ext.scaling import Traffic

WORLD = 4
SPLITS = [1, 2, 3, 6]  # elements for each rank
# torch 2.13 has new names for them.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def tensor(n: int = 12) -> Tensor:
    return torch.ones(n)


def several(n: int = 12) -> list[Tensor]:
    return [tensor(n) for _ in range(WORLD)]


def on_root(tensors: list[Tensor], root: int) -> list[Tensor] | None:
    return tensors if dist.get_rank() == root else None


def split_exchange() -> None:
    received = [SPLITS[dist.get_rank()]] * WORLD
    dist.all_to_all_single(tensor(sum(received)), tensor(), received, SPLITS)


def pass_on(wait: Callable[..., Any]) -> None:
    """Each rank sends to the next one, the last one to the first."""
    rank = dist.get_rank()
    to, source = (rank + 1) % WORLD, (rank - 1) % WORLD
    ordered = [dist.P2POp(dist.isend, tensor(), to), dist.P2POp(dist.irecv, tensor(), source)]
    for work in dist.batch_isend_irecv(ordered):
        wait(work)


def coalesced() -> None:
    with dist._coalescing_manager(group=dist.group.WORLD, async_ops=True) as manager:
        all_gather(tensor(48), tensor())
        all_gather(tensor(16), tensor(4))
    manager.wait()


def sharded(dimension: str) -> DTensor:
    """Over the ranks of a node, or over one rank of each node: 6 elements of 4 bytes each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))[dimension]
    return distribute_tensor(tensor(), mesh, [Shard(0)])


def redistribute(dimension: str) -> None:
    split = sharded(dimension)
    with METER[0]:
        split.redistribute(split.device_mesh, [Replicate()]).to_local().sum()


def operate() -> None:
    """An operator that needs all of the tensor."""
    split = sharded("node")
    with METER[0]:
        split.softmax(0).to_local().sum()


def functional(name: str, *args: Any, x: Tensor | None = None, space: str = "") -> Tensor:
    """Calls the operator itself: torch's functions for them have had several names."""
    call = getattr(getattr(torch.ops, f"_c10d_functional{space}"), name)
    sent = call(tensor() if x is None else x, *args, dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(sent)


def gathered_with_gradient() -> None:
    x = tensor().requires_grad_()
    functional("all_gather_into_tensor", WORLD, x=x, space="_autograd").sum().backward()


def subgroup(ranks: list[int]) -> None:
    group = dist.new_group(ranks)
    with METER[0]:
        if dist.get_rank() in ranks:
            dist.broadcast(tensor(), src=ranks[-1], group=group)


def compiled() -> None:
    group = dist.group.WORLD.group_name

    def gather(x: Tensor) -> Tensor:
        sent = torch.ops._c10d_functional.all_gather_into_tensor(2 * x, WORLD, group)
        return torch.ops._c10d_functional.wait_tensor(sent) + 1

    torch.compile(gather, backend="aot_eager")(tensor())


METER: list[WireMeter] = []
ALL_GATHER = [(48, 96, 1, 2)] * WORLD
ALL_REDUCE = [(24, 48, 2, 4)] * WORLD
REDUCE_SCATTER = [(12, 24, 1, 2)] * WORLD
NOTHING = (0, 0, 0, 0)
TO_RANK_0 = [NOTHING, (48, 0, 1, 0), (0, 48, 0, 1), (0, 48, 0, 1)]

# What is called; of each rank: bytes inside the node, to the other node, and messages.
CASES: dict[str, tuple[Callable[[], Any], list[tuple[int, int, int, int]]]] = {
    "all_gather": (lambda: dist.all_gather(several(), tensor()), ALL_GATHER),
    "all_gather_single": (lambda: all_gather(tensor(48), tensor()), ALL_GATHER),
    "coalesced all_gather": (coalesced, [(64, 128, 1, 2)] * WORLD),
    "all_reduce": (lambda: dist.all_reduce(tensor()), ALL_REDUCE),
    "async all_reduce": (lambda: dist.all_reduce(tensor(), async_op=True).wait(), ALL_REDUCE),
    "reduce_scatter": (lambda: dist.reduce_scatter(tensor(3), several(3)), REDUCE_SCATTER),
    "reduce_scatter_single": (lambda: reduce_scatter(tensor(3), tensor()), REDUCE_SCATTER),
    "all_to_all": (lambda: dist.all_to_all(several(3), several(3)), REDUCE_SCATTER),
    "all_to_all_single": (lambda: dist.all_to_all_single(tensor(), tensor()), REDUCE_SCATTER),
    "all_to_all_single in unequal parts": (
        split_exchange,
        [(8, 36, 1, 2), (4, 36, 1, 2), (24, 12, 1, 2), (12, 12, 1, 2)],
    ),
    "broadcast": (
        lambda: dist.broadcast(tensor(), src=1),
        [NOTHING, (48, 96, 1, 2), NOTHING, NOTHING],
    ),
    "broadcast in a group": (
        lambda: subgroup([1, 2, 3]),
        [NOTHING, NOTHING, NOTHING, (48, 48, 1, 1)],
    ),
    "reduce": (lambda: dist.reduce(tensor(), dst=0), TO_RANK_0),
    "gather": (lambda: dist.gather(tensor(), on_root(several(), 0), dst=0), TO_RANK_0),
    "scatter": (
        lambda: dist.scatter(tensor(), on_root(several(), 2), src=2),
        [NOTHING, NOTHING, (48, 96, 1, 2), NOTHING],
    ),
    "send": (
        lambda: pass_on(lambda work: work.wait()),
        [(48, 0, 1, 0), (0, 48, 0, 1), (48, 0, 1, 0), (0, 48, 0, 1)],
    ),
    "barrier": (dist.barrier, [NOTHING] * WORLD),
    "functional all_gather": (
        lambda: functional("all_gather_into_tensor", WORLD),
        ALL_GATHER,
    ),
    "functional all_reduce": (
        lambda: functional("all_reduce", "sum"),
        ALL_REDUCE,
    ),
    "functional reduce_scatter": (
        lambda: functional("reduce_scatter_tensor", "sum", WORLD),
        REDUCE_SCATTER,
    ),
    "functional all_to_all": (
        lambda: functional("all_to_all_single", [3] * WORLD, [3] * WORLD),
        REDUCE_SCATTER,
    ),
    "functional broadcast": (
        lambda: functional("broadcast", 1),
        [NOTHING, (48, 96, 1, 2), NOTHING, NOTHING],
    ),
    "all_gather and its gradient": (gathered_with_gradient, [(96, 192, 2, 4)] * WORLD),
    "DTensor inside a node": (lambda: redistribute("local"), [(24, 0, 1, 0)] * WORLD),
    "DTensor between nodes": (lambda: redistribute("node"), [(0, 24, 0, 1)] * WORLD),
    "DTensor in an operator": (operate, [(0, 24, 0, 1)] * WORLD),
    "compiled": (compiled, ALL_GATHER),
}
WITHIN = ("DTensor", "broadcast in a group")  # they switch the meter on themselves


def every_case() -> dict[str, Traffic]:
    dist.init_process_group("gloo")
    found = {}
    for name, (call, _) in CASES.items():
        METER[:] = [WireMeter(ranks_per_node=2)]
        if name.startswith(WITHIN):
            call()
        else:
            with METER[0]:
                call()
        found[name] = METER[0].count.total
        assert not METER[0].unknown
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Traffic]]:
    return run_distributed(every_case, WORLD)


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_messages_of(name: str, ranks: list[dict[str, Traffic]]) -> None:
    assert [rank[name] for rank in ranks] == [Traffic(*numbers) for numbers in CASES[name][1]]
