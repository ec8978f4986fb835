"""Gradients of one rank, before FSDP2 reduces them, and parameters that it has gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, run_distributed, shard
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, init_device_mesh

from lightning_ext._lightning import (
    OwnGradients,
    ShardedView,
    drop_unreduced,
    holds_unreduced,
    local_part,
    reshard,
)
from lightning_ext._lightning._own_gradients import _sharded_parameters


class OfRanks:
    """A Trainer that only knows its module."""

    def __init__(self, module: nn.Module) -> None:
        self.lightning_module = module


def sharded_net(**kwargs: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """A sharded net and the same one as it was."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    net, alike = Classifier(dropout=0).double().net, Classifier(dropout=0).double().net
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    shard(net, mesh, **kwargs)
    return net, alike


def own_batch() -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)


def watched(backwards: int, reshard_after_forward: bool | None) -> Any:
    net, alike = sharded_net(reshard_after_forward=reshard_after_forward)
    found: list[tuple[int, Tensor]] = []
    own = OwnGradients(net, list(net.parameters()), lambda i, g: found.append((i, g.clone())))
    for reduces in [False] * (backwards - 1) + [True]:
        net.set_requires_gradient_sync(reduces)
        loss = net(own_batch()).square().sum()
        own.look()
        loss.backward()
    own.remove()
    net(own_batch()).sum().backward()
    expected = torch.autograd.grad(alike(own_batch()).square().sum(), list(alike.parameters()))
    assert len(found) == backwards * len(expected)
    assert all(own.fired(index) for index in range(len(expected)))
    return all(torch.equal(gradient, expected[index]) for index, gradient in found)


@pytest.mark.parametrize("reshard_after_forward", [None, True, False])
def test_gradients_are_handed_over_before_they_are_reduced(
    reshard_after_forward: bool | None,
) -> None:
    assert all(run_distributed(watched, args=(2, reshard_after_forward)))


def hooks_left() -> Any:
    net, _ = sharded_net()
    own = OwnGradients(net, list(net.parameters()), lambda index, gradient: None)
    loss = net(own_batch()).sum()
    own.look()
    gathered = [x._unsharded_param for x in _sharded_parameters(net)]
    hooked = [*gathered, *net.parameters()]
    during = [bool(p._backward_hooks) for p in hooked]
    loss.backward()
    own.remove()
    own.remove()
    return during, [bool(p._backward_hooks) for p in hooked]


def test_no_hook_is_left() -> None:
    for during, after in run_distributed(hooks_left):
        assert all(during)
        assert not any(after)


def held(dtype: torch.dtype) -> list[bool]:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float64)
    net, _ = sharded_net(mp_policy=policy)
    found = [holds_unreduced(net)]
    for reduces in (False, True):
        net.set_requires_gradient_sync(reduces)
        net(own_batch().to(dtype)).sum().backward()
        found += [holds_unreduced(net), all(p.grad is None for p in net.parameters())]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_that_wait_for_their_reduction_are_known(dtype: torch.dtype) -> None:
    # In the dtype of the parameters they wait in one place, in another dtype in another place.
    assert run_distributed(held, args=(dtype,)) == [[False, True, True, False, False]] * 2


def dropped(dtype: torch.dtype) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float64)
    net, _ = sharded_net(mp_policy=policy)
    for reduces, times in ((False, 5.0), (True, 1.0)):
        drop_unreduced(net)
        net.set_requires_gradient_sync(reduces)
        (times * net(own_batch().to(dtype)).sum()).backward()
    alike, _ = sharded_net(mp_policy=policy)
    alike(own_batch().to(dtype)).sum().backward()
    pairs = zip(net.parameters(), alike.parameters(), strict=True)
    return all(torch.equal(local_part(a.grad), local_part(b.grad)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_that_are_dropped_count_no_more(dtype: torch.dtype) -> None:
    assert run_distributed(dropped, args=(dtype,)) == [True, True]


def after_evaluation() -> Any:
    net, _ = sharded_net()
    with torch.no_grad():
        net(own_batch())
    left = [isinstance(p, DTensor) for p in net.parameters()]
    trainer: Any = OfRanks(net)
    names = [
        isinstance(p, DTensor) for _, p in ShardedView(trainer, dist.group.WORLD).local_parameters()
    ]
    return left, names


def test_parameters_are_sharded_even_after_an_evaluation() -> None:
    # The trap: the outermost module keeps its unsharded parameters.
    assert run_distributed(after_evaluation) == [([True, True, False, False], [True] * 4)] * 2


def written_after_evaluation() -> float:
    net, _ = sharded_net()
    with torch.no_grad():
        net(own_batch())
        reshard(net)
        for parameter in net.parameters():
            parameter.zero_()
        return float(net(own_batch()).square().sum())


def test_what_is_written_after_resharding_counts() -> None:
    assert run_distributed(written_after_evaluation) == [0.0, 0.0]


def divided() -> Any:
    net, _ = sharded_net()
    trainer: Any = OfRanks(net)
    seen_by = ShardedView(trainer, dist.group.WORLD)
    none = seen_by.divide_factors
    modules: list[Any] = [m for m in net.modules() if isinstance(m, FSDPModule)]
    modules[0].set_gradient_divide_factor(2.0)
    ranks = seen_by.divide_factors
    modules[0].set_gradient_divide_factor(3.0)
    return none, ranks, seen_by.divide_factors


def test_divide_factors_other_than_the_ranks_are_known() -> None:
    assert run_distributed(divided) == [(set(), set(), {3.0})] * 2
