"""Advice on what schedules count, and on their length."""

from __future__ import annotations

from typing import Any

import pytest
from harness import loader
from harness._recipes import Scheduler, look, the_advice, topics
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import lr_scheduler as torch_schedulers

from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.optim import SampleSchedule

# AdaptiveBatchSize has a word to say of these too.
told_twice = pytest.mark.filterwarnings("ignore:The global batch may change")


def by_steps(optimizer: Any) -> Any:
    return torch_schedulers.StepLR(optimizer, 4)


def by_samples(optimizer: Any) -> Any:
    return SampleSchedule(optimizer, lambda s: 1 - s / 100, samples_per_step=8)


@told_twice
@pytest.mark.parametrize(
    "changing",
    [AdaptiveBatchSize("0:8 24:16"), GradientAccumulationScheduler({0: 1})],
    ids=lambda callback: type(callback).__name__,
)
def test_a_schedule_by_steps_under_a_changing_batch_is_a_warning(changing: Callback) -> None:
    settings = {"train": loader(96)}
    if isinstance(changing, GradientAccumulationScheduler):
        settings["accumulate_grad_batches"] = 1
    recipe = look(scheduler=by_steps, beside=[changing], **settings)
    assert topics(recipe) == {"schedule": "warning"}


def chained(optimizer: Any) -> Any:
    parts = [SampleSchedule(optimizer, lambda s: 0.9, samples_per_step=8) for _ in range(2)]
    return torch_schedulers.ChainedScheduler(parts, optimizer)


def after_one_another(optimizer: Any) -> Any:
    parts = [SampleSchedule(optimizer, lambda s: 0.9, samples_per_step=8) for _ in range(2)]
    return torch_schedulers.SequentialLR(optimizer, parts, [4])  # a number of steps


@told_twice
@pytest.mark.parametrize(
    ("scheduler", "interval", "severity"),
    [
        (by_samples, "step", None),
        (chained, "step", None),
        (after_one_another, "step", "warning"),
        (by_steps, "epoch", None),
        (lambda o: torch_schedulers.CosineAnnealingLR(o, 12), "epoch", "warning"),
    ],
    ids=["samples", "chained", "after one another", "epochs", "12 epochs of 1"],
)
def test_other_schedules_under_a_changing_batch(
    scheduler: Scheduler, interval: str, severity: str | None
) -> None:
    beside = [AdaptiveBatchSize("0:8 24:16")]
    recipe = look(scheduler=scheduler, interval=interval, beside=beside)
    assert topics(recipe) == ({} if severity is None else {"schedule": severity})


def test_a_schedule_of_one_entry_is_no_changing_batch() -> None:
    assert topics(look(scheduler=by_steps, beside=[AdaptiveBatchSize("0:8")])) == {}


def sequence(optimizer: Any, last: int) -> Any:
    parts = [
        torch_schedulers.LinearLR(optimizer, 0.1, 1.0, 2),
        torch_schedulers.CosineAnnealingLR(optimizer, last - 2),
    ]
    return torch_schedulers.SequentialLR(optimizer, parts, [2])


@pytest.mark.parametrize(
    "scheduler",
    [
        torch_schedulers.CosineAnnealingLR,
        torch_schedulers.PolynomialLR,
        sequence,
        lambda o, n: torch_schedulers.OneCycleLR(o, 0.1, n),
        lambda o, n: torch_schedulers.LinearLR(o, 1.0, 0.1, n),
    ],
    ids=["cosine", "polynomial", "sequence", "one cycle", "linear"],
)
@pytest.mark.parametrize(("steps", "severity"), [(12, None), (16, "advice"), (60, "warning")])
def test_a_schedule_has_the_length_of_the_run(
    scheduler: Any, steps: int, severity: str | None
) -> None:
    recipe = look(scheduler=lambda o: scheduler(o, steps))
    assert topics(recipe) == ({} if severity is None else {"schedule": severity})


def test_a_length_in_steps_that_is_stepped_by_epochs_is_told() -> None:
    recipe = look(scheduler=lambda o: torch_schedulers.CosineAnnealingLR(o, 8), interval="epoch")
    assert 'interval="step" if the length was meant' in the_advice(recipe).recommended
