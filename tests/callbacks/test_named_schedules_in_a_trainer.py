"""Named schedules beside AdaptiveBatchSize: their positions, and through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader, same_weights
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.optim import (
    LEGWWarmup,
    PowerScheduler,
    SampleCosine,
    SampleOneCycle,
    WeightDecaySchedule,
)
from lightning_ext.scaling import cosine_factor, linear_factor, power_lr, warmup_factor

Schedules = Callable[[Any], list[Any]]


class Scheduled(Classifier):
    """Has any number of schedulers on one optimizer."""

    def __init__(self, lr: float, schedules: Schedules) -> None:
        super().__init__()
        self.lr = lr
        self.all_schedules = schedules

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        configs = [{"scheduler": s, "interval": "step"} for s in self.all_schedules(optimizer)]
        return [optimizer], configs


class Note(Callback):
    """What each optimizer step is taken with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        schedule = trainer.lr_scheduler_configs[0].scheduler
        position = {"samples": schedule.samples_seen, "batch": schedule.samples_per_step}
        (group,) = optimizer.param_groups
        self.steps.append(position | {k: group[k] for k in ("lr", "betas", "weight_decay")})


def run(lr: float, schedules: Schedules, *others: Callback, **kwargs: Any) -> tuple[Any, Note]:
    note, module = Note(), Scheduled(lr, schedules)
    adaptive = AdaptiveBatchSize(
        "0:8 40:16 90:32", max_micro_batch=8, lr_rule="none", scale_weight_decay=False
    )
    fit([adaptive, note, *others], module=module, train=loader(50), max_epochs=4, **kwargs)
    return module, note


def test_the_rate_is_that_of_the_samples_seen_through_all_changes() -> None:
    make = partial(SampleCosine, total_samples=200, warmup_samples=24, samples_per_step=8)
    _, note = run(0.01, lambda optimizer: [make(optimizer)])
    for step in note.steps:
        factor = cosine_factor(step["samples"], total_samples=200, warmup_samples=24)
        assert step["lr"] == 0.01 * factor
    assert {8, 16, 32} <= {step["batch"] for step in note.steps}


def test_the_power_law_has_the_batch_of_the_very_step() -> None:
    law = {"a": 0.01, "lr_max": 0.02}
    make = partial(PowerScheduler, tokens_per_sample=10, samples_per_step=8, **law)
    _, note = run(1.0, lambda optimizer: [make(optimizer)])
    rates = [step["lr"] for step in note.steps]
    assert rates == [
        power_lr(10 * step["samples"], global_batch=step["batch"], **law) for step in note.steps
    ]
    assert len(set(rates)) > 5


def test_legws_warm_up_has_as_many_steps_whatever_the_batch() -> None:
    make = partial(LEGWWarmup, warmup_samples=80, reference_batch=8, samples_per_step=8)
    decay = partial(linear_factor, total_samples=400)
    _, note = run(0.01, lambda optimizer: [make(optimizer, then=decay)])
    for index, step in enumerate(note.steps):
        ramp = warmup_factor(index, warmup_samples=10)
        assert step["lr"] == pytest.approx(0.01 * ramp * decay(step["samples"]))


def everything(optimizer: Any) -> list[Any]:
    return [
        SampleOneCycle(optimizer, total_samples=200, samples_per_step=8),
        WeightDecaySchedule(optimizer, {0: 0.0, 64: 0.5, 120: 0.1}, samples_per_step=8),
    ]


def test_weight_decay_and_one_cycle_work_on_one_optimizer() -> None:
    _, note = run(0.01, everything)
    for step in note.steps:
        decay = next(
            d for start, d in ((120, 0.1), (64, 0.5), (0, 0.0)) if step["samples"] >= start
        )
        assert step["weight_decay"] == decay
    momenta = [step["betas"][0] for step in note.steps]
    assert momenta[0] == 0.95
    assert min(momenta) < 0.86


@pytest.mark.parametrize("which", ["power", "everything"])
def test_a_checkpoint_in_between_changes_nothing(which: str, tmp_path: Path) -> None:
    def power(optimizer: Any) -> list[Any]:
        return [PowerScheduler(optimizer, tokens_per_sample=10, a=0.01, samples_per_step=8)]

    lr, schedules = (1.0, power) if which == "power" else (0.01, everything)
    saving = partial(ModelCheckpoint, tmp_path, filename="{step}", save_top_k=-1)
    settings = {"enable_checkpointing": True}
    whole, note = run(lr, schedules, saving(every_n_train_steps=3), **settings)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) > 2
    for path in paths:
        again = saving(every_n_train_steps=3)
        module, rest = run(lr, schedules, again, ckpt_path=str(path), **settings)
        assert rest.steps == note.steps[len(note.steps) - len(rest.steps) :]
        assert same_weights(module, whole)
