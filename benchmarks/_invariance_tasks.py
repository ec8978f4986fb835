"""What `benchmarks/invariance.py` trains, at settings that meet the rules' conditions.

The rules hold where steps are small and where noise makes up most of a gradient, at the large
batch too. So the reference batch is 1 or 2, and learning rates are far below those that train
fastest. AdamW's second beta is 0.99: after a switch its second moment is still that of the small
batch, which it takes 1/(1 - beta) reference steps to forget. Windows of text are short, because the
noise scale counts windows. For SGD their embeddings start at 0.5: those that start at 0.02 make the
loss so sharp that it jumps at a switch. `docs/log.md` has the figures of what was tried before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.language_model.data import TextFolder
from examples.language_model.module import GPT
from examples.quickstart import DigitsCNN, digits

BETAS = (0.9, 0.99)
CONTEXT = 16
Loss = Callable[[Any], Tensor]


class Digits(DigitsCNN):
    """The quickstart's network with a choice of optimizer."""

    def __init__(self, optimizer: str, lr: float) -> None:
        super().__init__()
        self.chosen, self.lr = optimizer, lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, or AdamW."""
        if self.chosen == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=BETAS)


@dataclass(frozen=True)
class Task:
    """What is trained, and how long, in samples."""

    lr: dict[str, float]
    reference_batch: dict[str, int]
    samples: int
    switch: int
    every: int  # between two evaluations
    half_life: int  # of EMA
    load: Callable[[int], tuple[DataLoader[Any], Loss]]
    build: Callable[[str, float], LightningModule]


def load_digits(micro_batch: int) -> tuple[DataLoader[Any], Loss]:
    """The quickstart's images, and the loss on those to test on."""
    train, test = digits()
    images, labels = test.tensors
    loader = DataLoader(train, batch_size=micro_batch, shuffle=True)
    return loader, lambda module: F.cross_entropy(module.net(images), labels)


def load_text(micro_batch: int) -> tuple[DataLoader[Any], Loss]:
    """The example's windows, and the loss on 1,024 of other files."""
    data = TextFolder(context=CONTEXT, micro_batch=micro_batch, validation_windows=1024)
    parts = data.validation.rows.split(256)
    return data.train_dataloader(), lambda module: torch.stack(
        [module.loss(part) for part in parts]
    ).mean()


def build_gpt(optimizer: Any, lr: float) -> LightningModule:
    """The example's network; embeddings of 0.02 would bound SGD's learning rate."""
    std = 0.5 if optimizer == "sgd" else 0.02
    return GPT(context=CONTEXT, optimizer=optimizer, lr=lr, betas=BETAS, embedding_std=std)


TASKS = {
    "digits": Task(
        lr={"sgd": 5e-4, "adamw": 1.5e-4},
        reference_batch={"sgd": 2, "adamw": 1},
        samples=16 * 1280,
        switch=6 * 1280,
        every=1280,
        half_life=2000,
        load=load_digits,
        build=Digits,
    ),
    "language_model": Task(
        lr={"sgd": 3e-4, "adamw": 1.5e-4},
        reference_batch={"sgd": 1, "adamw": 1},
        samples=8192,
        switch=3072,
        every=512,
        half_life=1000,
        load=load_text,
        build=build_gpt,
    ),
}
