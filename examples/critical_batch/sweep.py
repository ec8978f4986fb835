"""The sweep of the study: steps to a validation loss, each batch at its best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.critical_batch.data import SharedText
from examples.critical_batch.module import FreshGPT, average
from lightning_ext.callbacks import sweep_batch_sizes
from lightning_ext.scaling import SweepRow

LR_BATCH = 16  # the batch that the learning rate of a setting belongs to
MICRO_BATCH = 128  # at most as many windows at once


@dataclass
class Setting:
    """What all parts of the study share.

    Attributes:
        module: the model.
        data: its windows.
        lr: of AdamW at a batch of 16 windows, by the square-root rule at others.
        seed: of weights and order.
        trainer: options of every Trainer, such as ``accelerator``.
    """

    module: FreshGPT
    data: SharedText
    lr: float = 7e-4
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)

    def lr_at(self, global_batch: int) -> float:
        """The learning rate in the middle of the grid."""
        return self.lr * (global_batch / LR_BATCH) ** 0.5


def sweep(
    setting: Setting,
    batches: Sequence[int],
    *,
    target: float,
    max_samples: int,
    evaluate_every_samples: int,
    results: Path,
) -> list[SweepRow]:
    """Runs what is missing in the file and returns all rows of these batches."""
    return sweep_batch_sizes(
        lambda _, lr: setting.module.fresh(lr),
        setting.data.at,
        batches=batches,
        monitor="val_loss",
        target=target,
        lr=setting.lr_at,
        max_samples=max_samples,
        evaluate_every_samples=evaluate_every_samples,
        seeds=[setting.seed],
        max_micro_batch=MICRO_BATCH,
        make_callbacks=average,
        trainer_options=setting.trainer,
        results=results,
    )
