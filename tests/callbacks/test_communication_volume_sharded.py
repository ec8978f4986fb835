"""What a step sends under sharding, against the sum that predicts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, fit, fsdp2, run_distributed, shard
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from lightning_ext.callbacks import CommunicationVolume, WireMeter
from lightning_ext.scaling import Traffic, communication_bytes, padded_parameters
from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy

FIRST = padded_parameters([(12, 6), (12,)], 2)  # of the unit inside; the outermost has the rest
OUTERMOST = padded_parameters([(3, 12), (3,)], 2)


class Sharded(Classifier):
    """As Lightning's own FSDP2 wants it."""

    def configure_model(self) -> None:
        """The first layer is a unit by itself."""
        shard(self.net, self.device_mesh)


class Recomputed(Sharded):
    """Runs the network again in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        _, x, y = batch
        out = checkpoint(self.net, x.requires_grad_(), use_reentrant=False)
        return nn.functional.cross_entropy(out, y)


class Deep(Classifier):
    """Three layers of a list, and one before them."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        layers = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)]
        self.net = nn.Sequential(nn.Linear(6, 12), *layers, nn.Linear(12, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Squared error of one batch."""
        _, x, y = batch
        return mse_loss(self.net(x), nn.functional.one_hot(y, 3).to(x))


class Itself(Deep):
    """Calls itself, as most do."""

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Squared error of one batch."""
        _, x, y = batch
        return mse_loss(self(x), nn.functional.one_hot(y, 3).to(x))


class Borrowed(Itself):
    """Has its loss from a step that it evaluates with, which calls another one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Squared error of one batch."""
        return self.validation_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The same."""
        return super().training_step(batch, batch_idx)


def measured(module: Any, ranks_per_node: int, **settings: Any) -> Any:
    volume = CommunicationVolume(ranks_per_node=ranks_per_node)
    fit([volume], module=module, max_steps=3, **settings)
    return volume.last


def with_lightnings(kind: type[Classifier], accumulate: int) -> Any:
    return measured(kind(), 1, accumulate_grad_batches=accumulate, **fsdp2(2))


def predicted(accumulate: int) -> Any:
    step = communication_bytes([FIRST], 2, 1, "fsdp2", root_params=OUTERMOST, accumulate=accumulate)
    return step.forward, step.backward, step.gradients


def parts(count: Any) -> tuple[Traffic, Traffic, Traffic]:
    return count.parts.forward, count.parts.backward, count.parts.gradients


def test_gathers_and_reductions_of_fsdp2_are_those_predicted() -> None:
    for count in run_distributed(with_lightnings, args=(Sharded, 1)):
        assert parts(count) == predicted(1)
        assert count.by("kind").keys() == {"all_gather", "reduce_scatter"}
        assert count.rest == Traffic()


def test_lightnings_fsdp2_reduces_in_every_micro_batch() -> None:
    for count in run_distributed(with_lightnings, args=(Sharded, 2)):
        forward, backward, gradients = predicted(2)
        assert parts(count) == (forward, backward, 2 * gradients)
        assert count.only(kind="reduce_scatter").calls == 4


def test_what_a_recomputed_forward_gathers_is_of_the_backward() -> None:
    for count in run_distributed(with_lightnings, args=(Recomputed, 1)):
        assert parts(count) == predicted(1)


OURS: dict[str, type[FSDP2Strategy]] = {"fsdp2": FSDP2Strategy, "zeropp": ZeroPPStrategy}


def with_ours(name: str, accumulate: int, clip: float | None) -> tuple[Any, Any]:
    strategy = OURS[name](ranks_per_node=2)
    volume = CommunicationVolume()
    fit(
        [volume],
        module=Deep(),
        max_steps=3,
        strategy=strategy,
        devices=4,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    return volume.last, strategy.units()


@pytest.mark.parametrize(("name", "accumulate"), [("fsdp2", 1), ("fsdp2", 3), ("zeropp", 3)])
def test_the_meter_and_the_prediction_agree_on_two_nodes(name: str, accumulate: int) -> None:
    for count, units in run_distributed(with_ours, 4, args=(name, accumulate, None)):
        outermost = units.pop("")
        assert len(units) == 3
        assert count.parts == communication_bytes(
            [*units.values()], 4, 2, name, root_params=outermost, accumulate=accumulate
        )
        assert count.rest == Traffic()
        reductions = [x for x in count.sent if x.phase == "backward" and x.kind != "all_gather"]
        assert len(reductions) == {"fsdp2": 4, "zeropp": 8}[name]  # of each unit one, or two hops


def with_paper(name: str, kind: type[Classifier]) -> Any:
    strategy, volume = OURS[name](ranks_per_node=2), CommunicationVolume()
    settings = {"strategy": strategy, "devices": 4, "accumulate_grad_batches": 2}
    fit([volume], module=kind(), max_steps=3, **settings)
    return volume.last.parts, strategy.communication()


@pytest.mark.parametrize("kind", [Itself, Borrowed])
@pytest.mark.parametrize("name", OURS)
def test_a_module_that_calls_itself_in_a_step_is_gathered_once(
    name: str, kind: type[Classifier]
) -> None:
    for found, paper in run_distributed(with_paper, 4, args=(name, kind)):
        assert found == paper
        assert name == "fsdp2" or found.backward.inter_bytes == 0


def split_again(how: dict[str, Any]) -> Any:
    strategy, volume = FSDP2Strategy(**how), CommunicationVolume()
    fit([volume], module=Deep(), max_steps=3, strategy=strategy, devices=4)
    return volume.last.parts, strategy.communication()


@pytest.mark.parametrize(
    "how",
    [
        {"reshard_after_forward": 2, "ranks_per_node": 4},
        {"reshard_after_forward": 2, "ranks_per_node": 2},
        {"device_mesh": (2, 2), "ranks_per_node": 2},
    ],
    ids=str,
)
def test_the_paper_knows_the_layout(how: dict[str, Any]) -> None:
    for found, paper in run_distributed(split_again, 4, args=(how,)):
        assert found == paper


def test_the_norm_of_gradients_is_none_of_the_parts() -> None:
    for count, _ in run_distributed(with_ours, 4, args=("fsdp2", 1, 1.0)):
        assert count.rest == Traffic(2, 4, 2, 4)  # quarters of one float32
        assert count.only(phase="other").total == count.rest


def replicated() -> Any:
    module = Classifier(dropout=0)
    strategy = FSDP2Strategy(lambda one: one is module.net[0], device_mesh=(2, 2))
    return measured(module, 2, strategy=strategy, devices=4)


def test_a_shard_inside_of_each_node_gathers_inside() -> None:
    for count in run_distributed(replicated, 4):
        by_kind = count.by("kind")
        assert by_kind["all_gather"].inter_bytes == by_kind["reduce_scatter"].inter_bytes == 0
        assert by_kind["all_reduce"].intra_bytes == 0
        assert by_kind["all_reduce"].inter_bytes == count.total.inter_bytes > 0
        assert count.by("group_size").keys() == {2}
        assert count.parts == communication_bytes(
            [FIRST], 4, 2, "fsdp2", root_params=OUTERMOST, accumulate=2, replicas=2
        )


def one_of_many() -> Any:
    """A rank of 64 whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=9, world_size=64)
    layers = [nn.Linear(10, 20), nn.Linear(20, 30), nn.Linear(30, 100)]
    net = nn.Sequential(*layers)
    for layer in layers[:2]:
        fully_shard(layer)
    fully_shard(net)
    with WireMeter(ranks_per_node=8) as meter:
        net(torch.ones(2, 10)).sum().backward()
    return meter.count, [padded_parameters([p.shape for p in x.parameters()], 64) for x in layers]


def test_one_process_stands_for_a_rank_of_many() -> None:
    ((count, (*units, outermost)),) = run_distributed(one_of_many, 1)
    assert count.parts == communication_bytes(units, 64, 8, "fsdp2", root_params=outermost)
