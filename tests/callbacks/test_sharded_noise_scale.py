"""The noise scale under FSDP2 against gradients taken by hand in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Part, Still, assert_accurate, dataset, fit, fsdp2, run_distributed, shard
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.data import AdaptiveBatchSampler


class Sharded(Still):
    """Args: how it is sharded."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def configure_model(self) -> None:
        shard(self.net, self.device_mesh, **self.how)


def measure(module: Still, processes: int, accumulate: int = 1, **kwargs: Any) -> Any:
    """The measurements of an epoch, and the batches of this rank."""
    data = dataset(96, next(module.parameters()).dtype)
    train = DataLoader(data, batch_sampler=AdaptiveBatchSampler(SequentialSampler(data), 4))
    noise = GradientNoiseScale(1, per_group=True)
    settings = fsdp2(processes, kwargs.pop("tensor_parallel_size", 1)) if processes > 1 else {}
    callbacks = [noise, *kwargs.pop("callbacks", [])]
    ranks = processes if processes == 1 else settings["strategy"]._data_parallel_size
    fit(
        [AdaptiveBatchSize(f"0:{4 * accumulate * ranks}"), *callbacks],
        module=module,
        train=train,
        accumulate_grad_batches=accumulate,
        **settings | {"max_epochs": 1, **kwargs},
    )
    return noise.state_dict()["history"], module.parts


def gradients(net: nn.Module, part: Part) -> list[Tensor]:
    """The mean gradient of a part in each of the two layers."""
    x, y = part
    found = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
    return [torch.cat([g.flatten() for g in layer]) for layer in (found[:2], found[2:])]


def pair(found: Sequence[Tensor], samples: Sequence[int]) -> list[float]:
    """|G|², tr Σ and the samples, from the scatter of the parts around their mean."""
    n = torch.tensor(samples, dtype=torch.float64)
    g = torch.stack(list(found))
    mean = (n[:, None] * g).sum(0) / n.sum()
    trace = (n * (g - mean).square().sum(1)).sum() / (len(n) - 1)
    return [float(mean.square().sum() - trace / n.sum()), float(trace), float(n.sum())]


def by_hand(batches: Sequence[Sequence[Part]], accumulate: int) -> Tensor:
    """Of all, and of each layer; the batches of each rank."""
    net, rows = Still().net, []
    for first in range(0, len(batches[0]), accumulate):
        parts = [part for rank in batches for part in rank[first : first + accumulate]]
        found = [gradients(net, part) for part in parts]
        sizes = [len(y) for _, y in parts]
        one, other = ([layers[i] for layers in found] for i in (0, 1))
        both = [torch.cat(layers) for layers in found]
        rows.append([*pair(both, sizes), *pair(one, sizes), *pair(other, sizes)])
    return torch.tensor(rows, dtype=torch.float64)


def check(found: Sequence[tuple[Tensor, list[Part]]], accumulate: int) -> None:
    measured = [one for one, _ in found]
    assert all(torch.equal(one, measured[0]) for one in measured)
    assert_accurate(measured[0], by_hand([batches for _, batches in found], accumulate))


def sharded(processes: int, accumulate: int, how: dict[str, Any]) -> Any:
    return measure(Sharded(**how), processes, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_and_micro_batches_are_parts(processes: int, accumulate: int) -> None:
    check(run_distributed(sharded, processes, args=(processes, accumulate, {})), accumulate)


@pytest.mark.parametrize("how", [{"replicas": 2}, {"reshard_after_forward": False}], ids=str)
def test_however_they_are_sharded(how: dict[str, Any]) -> None:
    check(run_distributed(sharded, 4, args=(4, 2, how)), 2)


def test_one_process_measures_the_same() -> None:
    measured, _ = run_distributed(sharded, args=(2, 2, {}))[0]
    alone, _ = measure(Still(), 1, 4)
    assert_accurate(measured, alone)


class Evaluated(Sharded):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[1])


def with_validation() -> Any:
    return measure(Evaluated(), 2, val=DataLoader(dataset(8, torch.float64)), val_check_interval=2)


def test_evaluations_between_do_not_matter() -> None:
    check(run_distributed(with_validation), 1)


class BothWays(Sharded):
    """Split for tensor parallelism, too."""

    def configure_model(self) -> None:
        plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def on_a_grid() -> Any:
    return measure(BothWays(), 4, 2, tensor_parallel_size=2)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
def test_tensor_parallel_ranks_make_one_part() -> None:
    found = run_distributed(on_a_grid, 4)
    check(found[::2], 2)
    assert torch.equal(found[0][0], found[1][0])


def in_half_precision() -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return measure(Sharded(mp_policy=policy).float(), 2, 2)


def test_lower_precision_measures_the_same_noise() -> None:
    found = run_distributed(in_half_precision)
    batches = [[(x.double(), y) for x, y in parts] for _, parts in found]
    exact = by_hand(batches, 2).mean(0)
    torch.testing.assert_close(found[0][0].mean(0), exact, rtol=2e-2, atol=0)


class LastPlain(Sharded):
    """The last layer is left to others."""

    reduced = False
    frozen = False

    def configure_model(self) -> None:
        self.net[3].requires_grad_(not self.frozen)
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])

    def on_after_backward(self) -> None:
        if self.reduced:  # the sum of what came so far; the mean over ranks is the same
            for parameter in self.net[3].parameters():
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)


def with_plain(accumulate: int, **settings: bool) -> Any:
    module = LastPlain()
    for name, value in settings.items():
        setattr(module, name, value)
    return measure(module, 2, accumulate)


def reduced_by_the_user() -> Any:
    return with_plain(1, reduced=True)


def with_a_frozen_layer() -> Any:
    return with_plain(2, frozen=True)


def refused(make: Any, *args: Any) -> str:
    with pytest.raises(MisconfigurationException) as error:
        make(*args)
    return str(error.value)


def test_plain_parameters_count_once() -> None:
    check(run_distributed(reduced_by_the_user), 1)


def test_frozen_plain_parameters_do_not_count() -> None:
    found = run_distributed(with_a_frozen_layer)
    measured = [one for one, _ in found]
    alone = by_hand([batches for _, batches in found], 2)[:, 3:6]
    assert_accurate(measured[0], torch.cat([alone, alone], 1))


def test_plain_parameters_that_nobody_reduces_are_refused() -> None:
    for text in run_distributed(refused, args=(with_plain, 2)):
        assert "net.3.weight, net.3.bias differ over the 2 data-parallel ranks" in text


class Divided(Sharded):
    def configure_model(self) -> None:
        super().configure_model()
        self.net[0].set_force_sum_reduction_for_comms(True)
        self.net[0].set_gradient_divide_factor(1.0)


def divided() -> Any:
    return measure(Divided(), 2)


def test_sums_instead_of_means_are_refused() -> None:
    for text in run_distributed(refused, args=(divided,)):
        assert "set_gradient_divide_factor was called with 1" in text


class OwnForward(nn.Linear):
    def go(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Aside(Still):
    """Its second layer is not called as a module."""

    def __init__(self) -> None:
        super().__init__()
        own = OwnForward(12, 3).double()
        own.load_state_dict(self.net[3].state_dict())
        self.net[3] = own

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self.net[3], "go")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        self.parts.append((x, y))
        return nn.functional.cross_entropy(self.net[3].go(self.net[:3](x)), y)


def aside() -> Any:
    return measure(Aside(), 2, 2)


def test_methods_that_are_no_forward_count() -> None:
    check(run_distributed(aside), 2)


class ByHand(Sharded):
    """It writes a gradient that no backward pass has made."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net[0](batch[1]).square().mean()

    def on_after_backward(self) -> None:
        weight = self.net[3].weight
        weight.grad = torch.ones_like(weight)


def by_hand_in_part() -> Any:
    return measure(ByHand(), 2)


def test_gradients_that_hooks_cannot_see_are_refused() -> None:
    for text in run_distributed(refused, args=(by_hand_in_part,)):
        assert "gradients of net.3.weight, net.3.bias are of no backward pass" in text


def hooks() -> list[bool]:
    module = Sharded()
    measure(module, 2)
    gathered: list[Tensor] = []
    for layer in (module.net[0], module.net[3]):
        layer.register_forward_pre_hook(lambda layer, _: gathered.extend(layer.parameters()))
    module.net(torch.zeros(1, 6, dtype=torch.float64))
    return [bool(p._backward_hooks) for p in [*gathered, *module.parameters()]]


def test_no_hook_is_left() -> None:
    assert run_distributed(hooks) == [[False] * 8] * 2
