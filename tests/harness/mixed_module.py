"""A module with every kind of parameter, and data that any number of ranks share alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

WORDS = 7
GLOBAL_MICRO = 8  # samples of a micro-batch over all ranks
ACCUMULATE = 4
STEPS_PER_EPOCH = 10
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}


class Layer(nn.Module):
    """A residual one with a gain for all."""

    def __init__(self, width: int, gain: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.ones(gain))

    def forward(self, x: Tensor) -> Tensor:
        """Adds to x."""
        return x + self.gain * self.down(torch.tanh(self.up(self.norm(x))))


class Mean(nn.Module):
    """An embedding of some words, and their mean."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, words: Tensor) -> Tensor:
        """Takes (samples, words) to (samples, width)."""
        return self.embedding(words).mean(1)


class Scores(nn.Module):
    """The head of a `Mixed`, with parameters of it that are not of this layer."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__()
        self.head, self.outer = mixed.head, (mixed,)

    def forward(self, x: Tensor) -> Tensor:
        """Takes (samples, width) to (samples, words)."""
        (outer,) = self.outer
        return self.head(x * outer.frozen + outer.shift) * outer.scale


class Mixed(LightningModule):
    """Repeated layers, and parameters that are tied, frozen, unused, single or without dimension.

    Args:
        optimizer: A key of `OPTIMIZERS`.
        width: Of its layers.
        scalar: Shape of those that are one number.
    """

    def __init__(
        self, optimizer: str = "sgd", width: int = 10, scalar: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(WORDS, width)
            self.layers = nn.ModuleList(Layer(width, scalar) for _ in range(2))
            self.head = nn.Linear(width, WORDS, bias=False)
            self.unused = nn.Linear(3, 1)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.full((width,), 1.5), requires_grad=False)
        self.scale = nn.Parameter(torch.full(scalar, 0.5))
        self.shift = nn.Parameter(torch.zeros(1))  # fewer elements than ranks
        self.chosen = optimizer

    def forward(self, words: Tensor) -> Tensor:
        """Scores of the next word."""
        x = words
        for layer in self.pipeline_layers():
            x = layer(x)
        return x

    def pipeline_layers(self) -> list[nn.Module]:
        """What a forward pass calls; the tied weight is in the first and in the last."""
        return [Mean(self.embedding), *self.layers, Scores(self)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, in which the last word has a greater weight."""
        words, following = batch
        weights = torch.linspace(1, 2, WORDS, dtype=self.scale.dtype)
        scores = self(words)
        losses = nn.functional.cross_entropy(scores, following, reduction="none")
        return (losses * weights[following].to(losses.dtype)).mean()

    def configure_optimizers(self) -> Optimizer:
        """The chosen one."""
        return OPTIMIZERS[self.chosen](self.parameters())


def batches(pipeline_ranks: int = 1, micro_batches: int = 1) -> DataLoader[Any]:
    """This rank's part of batches that all ranks together see as one process does.

    Args:
        pipeline_ranks: Ranks that share a part.
        micro_batches: Of one batch.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) // pipeline_ranks
    rank = int(os.environ.get("RANK", "0")) // pipeline_ranks
    count = STEPS_PER_EPOCH * ACCUMULATE * GLOBAL_MICRO
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(WORDS, (count, 4), generator=generator)
    following = torch.randint(WORDS, (count,), generator=generator)
    own = torch.arange(count).view(-1, world, GLOBAL_MICRO // world)[:, rank].flatten()
    size = micro_batches * GLOBAL_MICRO // world
    return DataLoader(TensorDataset(words[own], following[own]), size)
