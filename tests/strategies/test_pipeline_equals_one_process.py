"""A pipeline trains as one process does, in every order and layout."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import distance
from harness.strategy_cases import whole
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from examples.language_model.module import GPT
from lightning_ext.strategies import PipelineStrategy

MICRO, COUNT, ACCUMULATE, BATCHES = 4, 4, 2, 4
SHORT, LONG = 10, 50  # steps


def with_scheduler(optimizer: Optimizer) -> Any:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.8)
    entry = {"scheduler": scheduler, "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": entry}


QUICK = (  # the others are slow, all of them in the test of 50 steps
    "2 x 2",
    "2 x 2, depth-first",
    "2 x 1, 1F1B",
    "4 x 2",
    "2 x 2, FSDP2",
)


class MLP(LightningModule):
    """Eight layers between two others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            layers = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(8))
            self.net = nn.Sequential(*layers)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.last(self.net(self.first(x))), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        size = len(batch[0])
        self.log("train", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return with_scheduler(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9))


class Text(GPT):
    """The GPT of the example, very small, on pairs of which it takes the first."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            super().__init__(width=8, layers=8, heads=2, context=8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        size = len(batch[0])
        self.log("train", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch[0]), sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return with_scheduler(super().configure_optimizers())


MODULES: dict[str, Callable[[], LightningModule]] = {"mlp": MLP, "gpt": Text}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 x 2": (2, {}),
    "2 x 2, depth-first": (2, {"schedule": "interleaved_1f1b"}),
    "2 x 1, GPipe": (2, {"schedule": "gpipe"}),
    "2 x 1, 1F1B": (2, {"schedule": "1f1b"}),
    "1 x 8, DP 2": (2, {"stages_per_rank": "layers", "data_parallel_size": 2}),
    "4 x 1": (4, {"stages_per_rank": 1}),
    "4 x 1, GPipe": (4, {"schedule": "gpipe"}),
    "4 x 1, 1F1B": (4, {"schedule": "1f1b"}),
    "4 x 2": (4, {"stages_per_rank": 2}),
    "4 x 2, depth-first": (4, {"stages_per_rank": 2, "schedule": "interleaved_1f1b"}),
    "2 x 2, FSDP2": (4, {"data_parallel_size": 2}),
    "2 x 2, FSDP2, depth-first": (4, {"data_parallel_size": 2, "schedule": "interleaved_1f1b"}),
    "2 x 1, FSDP2, 1F1B": (4, {"data_parallel_size": 2, "schedule": "1f1b"}),
    "2 x 1, FSDP2, GPipe": (4, {"data_parallel_size": 2, "schedule": "gpipe"}),
    "2 x 2, DDP": (4, {"data_parallel_size": 2, "data_parallel": "ddp"}),
    "2 x 1, DDP, 1F1B": (
        4,
        {"data_parallel_size": 2, "data_parallel": "ddp", "schedule": "1f1b"},
    ),
    "2 x 2, recomputed": (2, {"activation_checkpointing": True}),
}


class Seen(Callback):
    """Losses of all batches, and the gradients of the first step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self.gradients:
            found = {n: p.grad for n, p in module.named_parameters()}
            self.gradients = {n: whole(g).clone() for n, g in found.items() if g is not None}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, *rest: Any
    ) -> None:
        # Lightning has divided it already.
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


class Fit(NamedTuple):
    """What is left of a fit on a rank."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    losses: Tensor
    metrics: dict[str, float]


def dataset(name: str, replicas: int = 1) -> TensorDataset:
    """What this rank sees of all samples."""
    replica = int(os.environ.get("RANK", "0")) * replicas // int(os.environ.get("WORLD_SIZE", "1"))
    generator = torch.Generator().manual_seed(1)
    count = MICRO * COUNT * BATCHES
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    if name == "gpt":
        x = torch.randint(256, (count, 9), generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return TensorDataset(x[replica::replicas], y[replica::replicas])


def fitted(name: str, steps: int, dtype: torch.dtype, options: dict[str, Any] | None) -> Fit:
    """By a pipeline with these options, or without options by one process."""
    seen, module = Seen(), MODULES[name]().to(dtype)
    replicas = (options or {}).get("data_parallel_size", 1)
    pieces = 1 if options is None else COUNT
    own: dict[str, Any] = {"use_distributed_sampler": False, "max_epochs": -1, "max_steps": steps}
    if options is not None:
        options = {"module": "blocks" if name == "gpt" else "net", **options}
        strategy = PipelineStrategy(num_microbatches=COUNT, **options)
        own |= {"strategy": strategy, "devices": int(os.environ["WORLD_SIZE"])}
    run = trainer(
        [seen],
        accumulate_grad_batches=ACCUMULATE * COUNT // pieces,
        gradient_clip_val=0.1,
        **own,
    )
    train = DataLoader(dataset(name, replicas), MICRO * pieces // replicas)
    run.fit(module, train, DataLoader(dataset(name), MICRO * COUNT))
    weights = {n: whole(p).detach().clone() for n, p in module.named_parameters()}
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    return Fit(weights, seen.gradients, torch.tensor(seen.losses, dtype=torch.float64), metrics)


@functools.cache
def alone(name: str, steps: int, dtype: torch.dtype) -> Fit:
    found = fitted(name, steps, dtype, None)
    return found._replace(losses=found.losses.view(-1, COUNT).mean(1))


def mean_losses(ranks: list[Fit]) -> Tensor:
    """Over replicas, all of whose ranks have the same."""
    return torch.stack([found.losses for found in ranks]).mean(0)


def require_one_process(name: str, layout: str, steps: int) -> None:
    world, options = LAYOUTS[layout]
    truth = alone(name, steps, torch.float64)
    ranks = run_distributed(fitted, world, args=(name, steps, torch.float64, options))
    assert set().union(*(found.weights for found in ranks)) == truth.weights.keys()
    for found in ranks:
        assert distance(found.weights, truth.weights) <= 1e-10
        assert found.metrics == pytest.approx(truth.metrics, rel=1e-10)
    assert torch.allclose(mean_losses(ranks), truth.losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "layout",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in LAYOUTS],
)
def test_an_mlp_is_trained_as_by_one_process(layout: str) -> None:
    require_one_process("mlp", layout, SHORT)


@pytest.mark.parametrize("layout", ["2 x 2"])
def test_a_gpt_is_trained_as_by_one_process(layout: str) -> None:
    require_one_process("gpt", layout, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_50_steps_are_those_of_one_process(name: str, layout: str) -> None:
    require_one_process(name, layout, LONG)


@pytest.mark.parametrize("layout", ["2 x 2", "4 x 2, depth-first", "2 x 2, FSDP2", "2 x 2, DDP"])
def test_first_gradients_in_float32_are_those_of_one_process(layout: str) -> None:
    world, options = LAYOUTS[layout]
    truth = alone("gpt", 1, torch.float32).gradients
    for found in run_distributed(fitted, world, args=("gpt", 1, torch.float32, options)):
        for name, gradient in found.gradients.items():
            assert (gradient - truth[name]).norm() <= 1e-6 * truth[name].norm()
