"""Groups of nodes, torch's extension points, and both collectives on a sharded module."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_api
from torch.distributed.tensor import DTensor

from lightning_ext.strategies import (
    QuantizedAllGather,
    QuantizedReduceScatter,
    ZeroPPStrategy,
    install_collectives,
    node_groups,
)


def test_torch_has_the_extension_points_where_they_are_looked_for() -> None:
    calls = {_fsdp_api.AllGather: ["group"], _fsdp_api.ReduceScatter: ["group", "op"]}
    for kind, between in calls.items():
        names = list(inspect.signature(kind.__call__).parameters)
        assert names == ["self", "output_tensor", "input_tensor", *between, "async_op"]
        assert list(inspect.signature(kind.allocate).parameters)[1:] == ["size", "dtype", "device"]
    assert issubclass(QuantizedAllGather, _fsdp_api.AllGather)
    assert issubclass(QuantizedReduceScatter, _fsdp_api.ReduceScatter)


@pytest.mark.parametrize("option", ["format", "error_format", "block_size"])
def test_defaults_are_those_of_the_strategy(option: str) -> None:
    name = "gradient_format" if option == "format" else option
    own = inspect.signature(QuantizedReduceScatter).parameters[option]
    assert own.default == inspect.signature(ZeroPPStrategy).parameters[name].default
    for setter in ("set_custom_all_gather", "set_custom_reduce_scatter", "_get_fsdp_state"):
        assert hasattr(FSDPModule, setter)


def _without_extension_points() -> str:
    sys.modules[_fsdp_api.__name__] = None  # type: ignore[assignment]  # as if it had moved
    for name in [n for n in sys.modules if n.startswith("lightning_ext.strategies")]:
        del sys.modules[name]
    room = importlib.import_module("lightning_ext.strategies")
    with pytest.raises(ImportError, match=r"tested with torch 2\.11 to 2\.13") as caught:
        room.QuantizedAllGather(2)
    return str(caught.value)


def test_a_torch_without_them_is_told_where_they_are_used() -> None:
    (message,) = run_distributed(_without_extension_points, 1)
    assert torch.__version__ in message


def _groups(ranks_per_node: int) -> tuple[Any, ...]:
    dist.init_process_group("gloo")
    groups = node_groups(ranks_per_node)
    members = [
        None if group is None else dist.get_process_group_ranks(group)
        for group in (groups.local, groups.across)
    ]
    return groups.ranks, groups.nodes, *members


def test_ranks_of_a_node_follow_each_other() -> None:
    found = run_distributed(_groups, 4, args=(2,))
    local, across = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert found == [((0, 1, 2, 3), 2, a, b) for a, b in zip(local, across, strict=True)]


@pytest.mark.parametrize(
    ("ranks_per_node", "nodes", "local", "across"), [(2, 1, [0, 1], None), (1, 2, None, [0, 1])]
)
def test_a_single_hop_goes_through_the_group_at_hand(
    ranks_per_node: int, nodes: int, local: list[int] | None, across: list[int] | None
) -> None:
    found = run_distributed(_groups, 2, args=(ranks_per_node,))
    assert found == [((0, 1), nodes, local, across)] * 2


def test_ranks_that_do_not_factor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not divide 2 ranks into nodes; allowed are \[1, 2"):
        run_distributed(_groups, 2, args=(3,))
    with pytest.raises(TypeError, match="is no integer"):
        run_distributed(_groups, 1, args=(1.0,))


def test_a_module_that_is_not_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match="call fully_shard on it first"):
        install_collectives(nn.Linear(2, 2))


def _installed() -> tuple[list[str], list[int]]:
    dist.init_process_group("gloo")
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard([module[0], module[1]])  # one unit of two modules
    fully_shard(module)
    groups, numbers = node_groups(2), []

    def made(number: int) -> QuantizedReduceScatter:
        numbers.append(number)
        return QuantizedReduceScatter(groups, error_feedback=True)

    reductions = install_collectives(module, reduce_scatter=made)
    module(torch.ones(2, 4)).sum().backward()
    assert all(x.state_dict()["errors"] for x in reductions.values())
    return list(reductions), numbers


def test_every_unit_has_a_reduction_of_its_own() -> None:
    assert run_distributed(_installed, 2) == [(["", "0"], [0, 1])] * 2


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(n, m), nn.GELU()) for n, m in [(9, 37), (37, 37), (37, 1)]]
    return nn.Sequential(*layers)


def _inputs(rank: int) -> Tensor:
    return torch.randn(16, 9, generator=torch.Generator().manual_seed(rank))


def _whole(parameters: list[Tensor]) -> Tensor:
    grads = [p.grad for p in parameters]
    return torch.cat([g.full_tensor().flatten() for g in grads if isinstance(g, DTensor)])


def _gradient(ranks_per_node: int, format: str, dtype: torch.dtype, force_sum: bool) -> Tensor:
    dist.init_process_group("gloo")
    module = _model().to(dtype)
    for unit in [*module, module]:
        fully_shard(unit)
        assert isinstance(unit, FSDPModule)
        unit.set_force_sum_reduction_for_comms(force_sum)
    groups = node_groups(ranks_per_node)
    install_collectives(
        module,
        reduce_scatter=lambda _: QuantizedReduceScatter(groups, format=format, block_size=64),
    )
    module(_inputs(dist.get_rank()).to(dtype)).square().sum().backward()
    return _whole(list(module.parameters()))


def _alone(rank: int, dtype: torch.dtype) -> Tensor:
    module = _model().to(dtype)
    module(_inputs(rank).to(dtype)).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("world", "ranks_per_node", "format", "dtype", "force_sum"),
    [
        (4, 2, "int8", torch.float32, False),
        (4, 2, "int8", torch.float32, True),
        (4, 2, "int4", torch.float32, False),
        (2, 2, "int8", torch.bfloat16, False),
        (2, 1, "int8", torch.float64, False),
    ],
)
def test_gradients_of_a_sharded_module_are_those_of_one_process(
    world: int, ranks_per_node: int, format: str, dtype: torch.dtype, force_sum: bool
) -> None:
    found = run_distributed(_gradient, world, args=(ranks_per_node, format, dtype, force_sum))
    alone = torch.stack([_alone(rank, dtype) for rank in range(world)]).double()
    largest = alone.abs().amax()
    half_step = largest / (127 if format == "int8" else 7) / 2
    hops = 2 if 1 < ranks_per_node < world else 1
    allowed = hops * half_step + 2 * torch.finfo(dtype).eps * largest
    assert all(x.equal(found[0]) for x in found)
    assert (found[0].double() - alone.mean(0)).abs().amax() <= allowed
