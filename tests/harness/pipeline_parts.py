"""A module with layers in a row, fitted by a pipeline and, beside it, in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from harness._fits import trainer
from lightning_ext.strategies import PipelineStrategy

MICRO, COUNT = 4, 4  # samples of a micro-batch over all replicas, and micro-batches of a batch
SAMPLES = 64
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}


class Chain(LightningModule):
    """Five layers in a row between two that are outside of them.

    Args:
        optimizer: A key of `OPTIMIZERS`.
        dropout: Of each layer.
    """

    def __init__(self, optimizer: str = "adamw", dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.first = nn.Linear(6, 10)
            layers = (
                nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Dropout(dropout)) for _ in range(5)
            )
            self.net = nn.Sequential(*layers)
            self.head = nn.Linear(10, 3)
        self.chosen = optimizer
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes."""
        return self.head(self.net(self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one micro-batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs the loss."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("val_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The chosen one."""
        return OPTIMIZERS[self.chosen](self.parameters())


def data(replicas: int = 1, replica: int = 0) -> TensorDataset:
    """The samples that one replica sees; together they see all, in batches of the same samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator).double()
    y = torch.randint(3, (SAMPLES,), generator=generator)
    return TensorDataset(x[replica::replicas], y[replica::replicas])


class Fit(NamedTuple):
    """What is left of a fit."""

    weights: dict[str, Tensor]
    metrics: dict[str, float]


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of this rank by name, those that are cut put together."""
    found = {n: p.detach() for n, p in module.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in found.items()}


def by_one(module: LightningModule | None = None, accumulate: int = 1, **kwargs: Any) -> Fit:
    """Fits in one process, by micro-batches.

    Args:
        module: By default a `Chain`.
        accumulate: Batches of an optimizer step under the pipeline.
        kwargs: Of the Trainer.
    """
    module = Chain() if module is None else module
    kwargs = {"max_epochs": 2, "accumulate_grad_batches": accumulate * COUNT, **kwargs}
    run = trainer(**kwargs)
    loaders = DataLoader(data(), MICRO), DataLoader(data(), MICRO * COUNT)
    run.fit(module, *loaders)
    return Fit(whole(module), _metrics(run))


def by_pipeline(
    module: LightningModule | None = None,
    options: dict[str, Any] | None = None,
    accumulate: int = 1,
    **kwargs: Any,
) -> Fit:
    """The same fit on a rank of several; see `by_one`.

    Args:
        module: By default a `Chain`.
        options: Of the strategy.
        accumulate: Batches of an optimizer step.
        kwargs: Of the Trainer.
    """
    module = Chain() if module is None else module
    run = pipeline_trainer(options, accumulate_grad_batches=accumulate, **kwargs)
    run.fit(module, *loaders((options or {}).get("data_parallel_size", 1)))
    return Fit(whole(module), _metrics(run))


def pipeline_trainer(options: dict[str, Any] | None = None, **kwargs: Any) -> Trainer:
    """A Trainer with the strategy, on the ranks that the harness has started.

    Args:
        options: Of the strategy.
        kwargs: Of the Trainer.
    """
    strategy = PipelineStrategy("net", **{"num_microbatches": COUNT, **(options or {})})
    own = {"strategy": strategy, "devices": int(os.environ["WORLD_SIZE"])}
    return trainer(**{"max_epochs": 2, "use_distributed_sampler": False, **own, **kwargs})


def loaders(replicas: int = 1) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches of this rank to train on, and to evaluate."""
    replica = int(os.environ["RANK"]) * replicas // int(os.environ["WORLD_SIZE"])
    size = MICRO * COUNT
    return DataLoader(data(replicas, replica), size // replicas), DataLoader(data(), size)


def _metrics(run: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The greatest difference of any element of the parameters that the first has."""
    return max(float((value - other[name]).abs().max()) for name, value in one.items())
