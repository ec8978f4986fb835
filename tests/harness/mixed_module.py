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
        x = self.embedding(words).mean(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.frozen + self.shift) * self.scale

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


def batches() -> DataLoader[Any]:
    """This rank's part of batches that all ranks together see as one process does."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    count = STEPS_PER_EPOCH * ACCUMULATE * GLOBAL_MICRO
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(WORDS, (count, 4), generator=generator)
    following = torch.randint(WORDS, (count,), generator=generator)
    own = torch.arange(count).view(-1, world, GLOBAL_MICRO // world)[:, rank].flatten()
    return DataLoader(TensorDataset(words[own], following[own]), GLOBAL_MICRO // world)
