"""A word about schedulers that count steps while the batch, and with it a step, changes."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakSet

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

_ANY = "SampleSchedule with a function of samples"
_REPLACEMENTS: dict[type[LRScheduler], str] = {
    ConstantLR: _ANY,
    CosineAnnealingLR: "SampleCosine",
    CosineAnnealingWarmRestarts: _ANY,
    CyclicLR: _ANY,
    ExponentialLR: _ANY,
    LambdaLR: _ANY,
    LinearLR: "SampleWarmup, or SampleLinear where it falls",
    MultiStepLR: _ANY,
    MultiplicativeLR: _ANY,
    OneCycleLR: "SampleOneCycle",
    PolynomialLR: "SampleLinear for power 1, else " + _ANY,
    SWALR: _ANY,
    SequentialLR: "one schedule for the whole run: warmup_samples= of SampleCosine, SampleLinear"
    " and SampleWSD",
    StepLR: _ANY,
}

_warned: WeakSet[LRScheduler] = WeakSet()


def warn_of_step_schedules(trainer: Trainer) -> None:
    """Warns, once for a scheduler, of those of torch that are stepped with the optimizer.

    They count steps, so that a batch that changes moves them. Schedules by samples, those by
    epochs, ``ReduceLROnPlateau`` and constants do not, and schedulers of unknown classes are taken
    to know what they do.

    Args:
        trainer: A Trainer whose optimizers are set up.
    """
    configs = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    every = [scheduler for config in configs for scheduler in _counting(config.scheduler)]
    found = [scheduler for scheduler in every if scheduler not in _warned]
    if not found:
        return
    _warned.update(found)
    hints = dict.fromkeys(f"{type(s).__name__} → {_replacement(s)}" for s in found)
    rank_zero_warn(
        "The global batch may change, and with interval='step' these schedulers count optimizer"
        " steps: they reach another position after the same number of samples. Hint: in"
        f" lightning_ext.optim there are schedules by samples: {'; '.join(hints)}."
    )


def _counting(scheduler: object) -> Iterator[LRScheduler]:
    """Those that count steps in a scheduler, nested ones included."""
    if isinstance(scheduler, LRScheduler) and _counts_steps(scheduler):
        yield scheduler
    for nested in getattr(scheduler, "_schedulers", ()):
        yield from _counting(nested)


def _counts_steps(scheduler: LRScheduler) -> bool:
    if isinstance(scheduler, ConstantLR):
        return scheduler.factor != 1
    if isinstance(scheduler, SequentialLR):
        return bool(scheduler._milestones)
    return isinstance(scheduler, tuple(_REPLACEMENTS))


def _replacement(scheduler: LRScheduler) -> str:
    return next(hint for cls, hint in _REPLACEMENTS.items() if isinstance(scheduler, cls))
