"""What one run says of its critical batch: noise scales in four geometries, and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from examples.critical_batch.module import average
from examples.critical_batch.sweep import MICRO_BATCH, Setting
from lightning_ext.callbacks import CriticalBatchSize, GradientNoiseScale
from lightning_ext.scaling import BranchedCriticalBatch

GEOMETRIES = ("euclidean", "l1", "nuclear", "adam")
PARTS = 8  # micro-batches of a step: norms other than the Euclidean one need as many
SMOOTHING = 0.9  # the last 20 steps or so


class Point(NamedTuple):
    """One measurement.

    Args:
        name: what measured it.
        samples: that the run had taken.
        loss: of the validation windows there, of the averaged weights.
        value: in samples.
        low: lower limit.
        high: upper limit.
    """

    name: str
    samples: int
    loss: float
    value: float
    low: float
    high: float


class Recorder(Callback):
    """Takes down every noise scale at each evaluation, and ends the run at the target."""

    def __init__(self, scales: dict[str, GradientNoiseScale], batch: int, target: float) -> None:
        self.scales, self.batch, self.target = scales, batch, target
        self.points: list[Point] = []
        self.losses: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the loss and the scales."""
        samples = trainer.global_step * self.batch
        loss = float(trainer.callback_metrics["val_loss"])
        self.losses.append((samples, loss))
        for name, scale in self.scales.items():
            try:
                found = scale.estimate()
            except ValueError:  # Adam's geometry measures nothing before it has second moments
                continue
            self.points.append(Point(name, samples, loss, found.value, found.low, found.high))
        trainer.should_stop = trainer.should_stop or loss <= self.target


def noise_scales(
    setting: Setting, batch: int, *, target: float, every: int, most: int
) -> list[Point]:
    """Trains to the target at one batch and returns the noise scales on the way."""
    scales = {g: GradientNoiseScale(1, SMOOTHING, geometry=g, prefix=g) for g in GEOMETRIES}
    recorder = Recorder(scales, batch, target)
    callbacks = [*scales.values(), *average(batch), recorder]
    _fit(setting, batch, callbacks, accumulate=PARTS, every=every, most=most)
    return recorder.points


def branched(
    setting: Setting,
    batch: int,
    multipliers: Sequence[int],
    *,
    samples: int,
    at: Sequence[int],
    every: int,
) -> list[Point]:
    """Trains at a small batch and returns what its branches say, as far as the last of ``at``."""
    branches = CriticalBatchSize(multipliers, samples=samples, at_samples=at, lr_rule="sqrt")
    recorder = Recorder({}, batch, 0.0)
    callbacks = [*average(batch), recorder, branches]
    _fit(setting, batch, callbacks, accumulate=1, every=every, most=max(at) + every)
    return [_point(seen, found, recorder.losses) for seen, found in branches.history]


def _point(samples: int, found: BranchedCriticalBatch, losses: list[tuple[int, float]]) -> Point:
    loss = min(losses, key=lambda entry: abs(entry[0] - samples))[1]
    return Point("branched", samples, loss, found.value, found.value, found.high)


def _fit(
    setting: Setting,
    batch: int,
    callbacks: list[Callback],
    *,
    accumulate: int,
    every: int,
    most: int,
) -> None:
    seed_everything(setting.seed, verbose=False)
    steps = max(1, every // batch)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    options |= setting.trainer
    trainer = Trainer(
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        logger=False,
        max_epochs=-1,
        max_steps=max(1, most // batch),
        num_sanity_val_steps=0,
        val_check_interval=steps * accumulate,
        **options,
    )
    micro_batch = min(batch // accumulate, MICRO_BATCH)
    module, data = setting.module.fresh(setting.lr_at(batch)), setting.data.at(micro_batch)
    trainer.fit(module, datamodule=data)
