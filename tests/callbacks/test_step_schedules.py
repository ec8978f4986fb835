"""Schedulers that count steps are named, with what replaces them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from harness import Classifier, fit
from torch.optim.lr_scheduler import (
    ChainedScheduler,
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
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

from lightning_ext import optim
from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.optim import SampleCosine, SampleWarmup


def messages(make: Callable[[Any], Any], interval: str = "step", **kwargs: Any) -> list[str]:
    """What a small run with this scheduler warns of."""

    def entry(optimizer: Any) -> Any:
        return {"scheduler": make(optimizer), "interval": interval, **kwargs}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            [AdaptiveBatchSize("0:8 96:16")],
            module=Classifier("sgd", schedulers=entry),
            max_epochs=2,
        )
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "count optimizer steps" in text]


STEPPED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "CosineAnnealingLR": (lambda o: CosineAnnealingLR(o, 30), "SampleCosine"),
    "CosineAnnealingWarmRestarts": (
        lambda o: CosineAnnealingWarmRestarts(o, 30),
        "SampleSchedule",
    ),
    "LinearLR": (lambda o: LinearLR(o), "SampleWarmup, or SampleLinear"),
    "PolynomialLR": (lambda o: PolynomialLR(o, 30), "SampleLinear"),
    "OneCycleLR": (lambda o: OneCycleLR(o, 0.1, total_steps=60), "SampleOneCycle"),
    "LambdaLR": (lambda o: LambdaLR(o, lambda step: 0.9**step), "SampleSchedule"),
    "MultiplicativeLR": (lambda o: MultiplicativeLR(o, lambda step: 0.9), "SampleSchedule"),
    "StepLR": (lambda o: StepLR(o, 5), "SampleSchedule"),
    "MultiStepLR": (lambda o: MultiStepLR(o, [5]), "SampleSchedule"),
    "ExponentialLR": (lambda o: ExponentialLR(o, 0.9), "SampleSchedule"),
    "CyclicLR": (lambda o: CyclicLR(o, 0.01, 0.1), "SampleSchedule"),
    "ConstantLR": (lambda o: ConstantLR(o, 0.5), "SampleSchedule"),
    "SWALR": (lambda o: SWALR(o, 0.05), "SampleSchedule"),
}


@pytest.mark.parametrize("name", STEPPED)
def test_a_scheduler_that_counts_steps_is_named_once_with_its_replacement(name: str) -> None:
    make, replacement = STEPPED[name]
    (message,) = messages(make)
    assert f"{name} → {replacement}" in message


def test_every_replacement_exists() -> None:
    hints = " ".join(hint for _, hint in STEPPED.values()).replace(",", "").split()
    names = {word for word in hints if word.startswith("Sample")}
    assert {"SampleSchedule", "SampleCosine"} <= names <= set(optim.__all__)


def test_a_subclass_is_named_by_its_own_name() -> None:
    class Mine(CosineAnnealingLR):
        pass

    (message,) = messages(lambda o: Mine(o, 30))
    assert "Mine → SampleCosine" in message


def test_nested_ones_are_named_together() -> None:
    def nested(o: Any) -> Any:
        parts = [ChainedScheduler([LinearLR(o)]), CosineAnnealingLR(o, 30)]
        return SequentialLR(o, parts, [5])

    (message,) = messages(nested)
    for name in ("SequentialLR → ", "LinearLR → ", "CosineAnnealingLR → "):
        assert name in message


def test_the_milestones_of_a_sequence_count_steps_too() -> None:
    def nested(o: Any) -> Any:
        parts = [
            SampleWarmup(o, warmup_samples=40, samples_per_step=8),
            SampleCosine(o, total_samples=192, samples_per_step=8),
        ]
        return SequentialLR(o, parts, [5])

    (message,) = messages(nested)
    assert "SequentialLR → one schedule for the whole run" in message


class Own(LRScheduler):
    """Of a class that only its author knows."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]


SILENT: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "by samples": (lambda o: SampleCosine(o, total_samples=192, samples_per_step=8), {}),
    "by samples, chained": (
        lambda o: ChainedScheduler([SampleCosine(o, total_samples=192, samples_per_step=8)]),
        {},
    ),
    "by epochs": (lambda o: CosineAnnealingLR(o, 2), {"interval": "epoch"}),
    "on a plateau": (lambda o: ReduceLROnPlateau(o), {"monitor": "train_loss"}),
    "constant": (lambda o: ConstantLR(o, 1.0), {}),
    "unknown": (lambda o: Own(o), {}),
}


@pytest.mark.parametrize("name", SILENT)
def test_others_are_left_in_peace(name: str) -> None:
    make, settings = SILENT[name]
    assert messages(make, **settings) == []
