"""Modules that are built without memory, and filled as they are sharded."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed, trainer
from harness.fsdp2_parts import by_fsdp2
from harness.mixed_module import Mixed, batches
from harness.strategy_cases import Weights, distance, whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_ext.strategies import FSDP2Strategy


class Plain(LightningModule):
    """An embedding tied to the head, repeated layers, a normalization with buffers."""

    def __init__(self, device: str = "meta", seed: int = 0) -> None:
        super().__init__()
        self.where, self.seed = device, seed
        self.net: Any = nn.Module()

    def configure_model(self) -> None:
        """Builds it, with memory or without."""
        torch.manual_seed(self.seed)
        with torch.device(self.where):
            self.build()

    def build(self) -> None:
        self.net.embedding = nn.Embedding(7, 6)
        self.net.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2)
        )
        self.net.head = nn.Linear(6, 7)
        self.net.head.weight = self.net.embedding.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        words, following = batch
        x = self.net.embedding(words).mean(1)
        for layer in self.net.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.net.head(x), following)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Stochastic gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Start(Callback):
    """Keeps what a fit began with."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        net: Any = module.net
        self.tied = net.head.weight is net.embedding.weight
        self.placed = {str(one.device) for one in (*module.parameters(), *module.buffers())}
        self.weights = {name: whole(one).clone() for name, one in module.state_dict().items()}


def started(module: LightningModule, wrap: Any = "transformer_layers") -> Any:
    start = Start()
    by_fsdp2(module, 1, how={"wrap": wrap}, callbacks=[start])
    return start.weights, start.tied, start.placed


def from_meta(wrap: Any) -> Any:
    return started(Plain(), wrap)


def built() -> Weights:
    module = Plain("cpu")
    module.configure_model()
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("wrap", ["transformer_layers", None])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_are_those_of_one_process_whatever_ranks_and_units(world: int, wrap: Any) -> None:
    for found, tied, placed in run_distributed(from_meta, world, args=(wrap,)):
        assert tied
        assert placed == {"cpu"}
        assert distance(found, built()) == 0


class Seeded(Plain):
    """Every rank has another seed."""

    def configure_model(self) -> None:
        """After the process group is there."""
        self.seed = dist.get_rank()
        super().configure_model()


def seeded(device: str) -> Any:
    return started(Seeded(device))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_values_of_rank_zero_are_those_of_all(device: str) -> None:
    for found, *_ in run_distributed(seeded, args=(device,)):
        assert distance(found, built()) == 0


class Early(Plain):
    """Builds itself at once."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def configure_model(self) -> None:
        """Nothing is left to build."""
        torch.manual_seed(0)


def by_init_module() -> Any:
    start = Start()
    run = trainer([start], strategy=FSDP2Strategy(), devices=2, max_steps=1)
    with run.init_module(empty_init=True):
        module = Early()
    assert all(one.is_meta for one in module.parameters())
    run.fit(module, batches())
    return start.weights


def test_a_module_of_init_module_is_filled() -> None:
    for found in run_distributed(by_init_module):
        assert distance(found, built()) == 0


class Helpless(Plain):
    """Has a parameter that nothing fills."""

    def build(self) -> None:
        super().build()
        self.net.scale = nn.Parameter(torch.ones(6))


def helpless() -> None:
    by_fsdp2(Helpless(), 1)


def test_a_module_that_cannot_fill_itself_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"`reset_parameters\(\)`.* Module: scale"):
        run_distributed(helpless, 1)


class Parts(Mixed):
    """Buffers of several dtypes, and a parameter with a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("none", torch.empty(0))


def buffers() -> Any:
    module = Parts()
    if os.environ["RANK"] == "1":
        module.flags.logical_not_()
    by_fsdp2(module, 1)
    return module.flags.tolist(), module.count.item()


def test_buffers_of_any_dtype_are_those_of_rank_zero() -> None:
    assert run_distributed(buffers) == [([True, False], 3)] * 2
