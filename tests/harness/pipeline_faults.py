"""Batches, layers and fits that go wrong under a pipeline, or nearly."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.pipeline_parts import COUNT, MICRO, Chain, data, pipeline_trainer, whole

SIZE = MICRO * COUNT
TIMEOUT = timedelta(seconds=20)
Batches = Sequence[Any]


def batches(*sizes: int) -> Batches:
    """Pairs of samples and classes, so many in each."""
    x, y = data().tensors
    return [(x[:size], y[:size]) for size in sizes]


def as_it_is(batch: Any) -> Any:
    """A batch."""
    return batch


def loader(own: Any, collate: Callable[[Any], Any] = as_it_is) -> DataLoader[Any]:
    """Gives batches one after the other, as they are.

    Args:
        own: The batches.
        collate: What is made of each.
    """
    return DataLoader(own, batch_size=None, collate_fn=collate)


def rank() -> int:
    """Of this process."""
    return int(os.environ["RANK"])


class Own(nn.Module):
    """A layer that is a function, of other layers."""

    def __init__(self, function: Callable[..., Any], *inner: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(inner)

    def forward(self, *inputs: Any) -> Any:
        """What the function returns."""
        return self.function(*inputs)


def fail(where: int | None = None) -> None:
    """Raises an error, on one rank or on the one that calls."""
    if where is None or rank() == where:
        raise KeyError("of a user")


def fitting(**options: Any) -> Trainer:
    """A Trainer with a pipeline of these options, that does not accumulate or validate."""
    how = {"accumulate_grad_batches": 1, "limit_val_batches": 0}
    return pipeline_trainer({"timeout": TIMEOUT, **options}, **how)


def weights(module: Chain, own: Batches, **options: Any) -> dict[str, Tensor]:
    """Parameters of this rank after a fit."""
    run = fitting(**options)
    run.fit(module, loader(own))
    return whole(module)
