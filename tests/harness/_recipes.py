"""A run that LargeBatchRecipe looks at, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from harness._fits import Classifier, fit
from lightning_ext.callbacks import GradientNoiseScale, LargeBatchRecipe
from lightning_ext.scaling import NoiseScale

Scheduler = Callable[[Any], Any]


class RecipeModule(Classifier):
    """SGD with momentum and no decay, extra layers that do nothing, and any optimizer."""

    def __init__(
        self,
        *extra: nn.Module,
        optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        scheduler: Scheduler | None = None,
        interval: str = "step",
    ) -> None:
        super().__init__("sgd", dropout=0.0)
        self.extra = nn.ModuleList(extra)
        self.make = optimizer
        self.scheduler = scheduler
        self.interval = interval

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = self.make(self.parameters())
        if self.scheduler is None:
            return optimizer
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}


def look(
    *extra: nn.Module,
    reference_batch: int | None = None,
    reference_lr: float | None = None,
    beside: Sequence[Callback] = (),
    train: Any = None,
    optimizer: Callable[[Any], Any] | None = None,
    scheduler: Scheduler | None = None,
    interval: str = "step",
    **kwargs: Any,
) -> LargeBatchRecipe:
    """The recipe after a fit of 96 samples in steps of 2 × 4, one epoch unless told otherwise."""
    recipe = LargeBatchRecipe(reference_batch=reference_batch, reference_lr=reference_lr)
    made = {} if optimizer is None else {"optimizer": optimizer}
    module = RecipeModule(*extra, scheduler=scheduler, interval=interval, **made)
    fit([*beside, recipe], module=module, train=train, **{"max_epochs": 1, **kwargs})
    return recipe


def topics(recipe: LargeBatchRecipe) -> dict[str, str]:
    """Severities by topic."""
    return {advice.topic: advice.severity for advice in recipe.advice}


def the_advice(recipe: LargeBatchRecipe) -> Any:
    """The only one that there is."""
    (advice,) = recipe.advice
    return advice


class Measured(GradientNoiseScale):
    """A noise scale that is known."""

    value = 10.0

    @property
    def measured(self) -> bool:
        """Always."""
        return True

    @measured.setter
    def measured(self, _: bool) -> None:
        """Nothing is measured."""

    def estimate(self, group: int | None = None) -> NoiseScale:
        """`value` ± 20 %."""
        return NoiseScale(self.value, 0.8 * self.value, 1.2 * self.value, 1.0, self.value, 1000)


def decayed(params: Any) -> Any:
    """SGD with weight decay on everything."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
