"""Parameters that a pipeline has on several ranks, on none, or that are not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import Fit, by_one, by_pipeline, distance
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 6


class Gained(nn.Module):
    """A layer with a gain without dimension, and with a part that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.idle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.linear(x))


class Chain(LightningModule):
    """Four layers; `outer` is used before and behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        self.net = nn.Sequential(*layers)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        found = self.outer(torch.tanh(self.net(self.outer(x))))
        return F.cross_entropy(self.head(found), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def tied(*indices: int) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        for index in indices[1:]:
            module.net[index].weight = module.net[indices[0]].weight

    return change


def tied_to_what_is_outside(module: Any) -> None:
    module.outer.weight = module.net[1].weight


def frozen_first_stage(module: Any) -> None:
    module.net[0].requires_grad_(False)
    module.outer.requires_grad_(False)


def frozen_last_stage(module: Any) -> None:
    module.net[3].requires_grad_(False)


def stage_without_parameters(module: Any) -> None:
    module.net[2] = nn.Tanh()


def gains_and_unused(module: Any) -> None:
    module.net[1], module.net[2] = Gained(), Gained()


def buffers(module: Any) -> None:
    module.net[1] = nn.BatchNorm1d(WIDTH)


CHANGES: dict[str, Callable[[Any], None]] = {
    "used before and behind": lambda module: None,
    "tied on two ranks": tied(0, 3),
    "tied on one rank": tied(0, 2),
    "tied thrice": tied(0, 2, 3),
    "tied to what is outside": tied_to_what_is_outside,
    "frozen first stage": frozen_first_stage,
    "frozen last stage": frozen_last_stage,
    "a stage without parameters": stage_without_parameters,
    "gains and unused": gains_and_unused,
    "buffers": buffers,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 x 2": (2, {"stages_per_rank": "layers"}),
    "1 x 4, FSDP2": (2, {"stages_per_rank": "layers", "data_parallel_size": 2}),
    "2 x 2, FSDP2": (4, {"stages_per_rank": "layers", "data_parallel_size": 2}),
    "2 x 2, DDP": (
        4,
        {"stages_per_rank": "layers", "data_parallel_size": 2, "data_parallel": "ddp"},
    ),
}


def changed(change: str) -> Chain:
    module = Chain()
    CHANGES[change](module)
    return module.double()


def fitted(change: str, options: dict[str, Any]) -> tuple[Fit, dict[str, Tensor]]:
    module = changed(change)
    found = by_pipeline(module, options, 2, gradient_clip_val=0.1)
    return found, {name: x.clone() for name, x in module.named_buffers()}


def require_one_process(change: str, layout: str) -> list[dict[str, Tensor]]:
    truth = by_one(changed(change), 2, gradient_clip_val=0.1)
    world, options = LAYOUTS[layout]
    ranks = run_distributed(fitted, world, args=(change, options))
    assert set().union(*(found.weights for found, _ in ranks)) == truth.weights.keys()
    for found, _ in ranks:
        assert distance(found.weights, truth.weights) <= 1e-10
        assert found.metrics == pytest.approx(truth.metrics, rel=1e-10)
    return [buffers for _, buffers in ranks]


@pytest.mark.parametrize("change", CHANGES)
def test_two_ranks_are_one_process(change: str) -> None:
    require_one_process(change, "2 x 2")


REPLICATED = [change for change in CHANGES if change != "buffers"]  # replicas have their own


# What the test of two ranks shows, too, is slow where replicas add nothing of their own.
QUICK = ("tied on two ranks", "tied to what is outside", "tied thrice", "gains and unused")


@pytest.mark.parametrize(
    "change", [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in REPLICATED]
)
def test_two_replicas_of_all_stages_are_one_process(change: str) -> None:
    require_one_process(change, "1 x 4, FSDP2")


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        ("gains and unused", "2 x 2, FSDP2"),
        ("tied thrice", "2 x 2, DDP"),
        pytest.param("tied thrice", "2 x 2, FSDP2", marks=pytest.mark.slow),
        pytest.param("frozen first stage", "2 x 2, FSDP2", marks=pytest.mark.slow),
        pytest.param("gains and unused", "2 x 2, DDP", marks=pytest.mark.slow),
        pytest.param("frozen first stage", "2 x 2, DDP", marks=pytest.mark.slow),
    ],
)
def test_two_replicas_of_two_ranks_are_one_process(change: str, layout: str) -> None:
    require_one_process(change, layout)


def test_running_statistics_are_those_of_one_process() -> None:
    module = changed("buffers")
    by_one(module, 2, gradient_clip_val=0.1)
    first, last = require_one_process("buffers", "2 x 2")
    assert not first  # the layer is on the other rank
    for name, truth in module.named_buffers():
        assert torch.allclose(last[name].double(), truth.double(), rtol=1e-10, atol=0)
