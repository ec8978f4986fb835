"""Keeps in step what Lightning remembers of the number of batches in an epoch.

Private: ``fit_loop._combined_loader.limits`` and its ``_iterator.limits``,
    ``fit_loop._data_fetcher.length``, ``fit_loop.max_batches``, ``trainer.val_check_batch``, the
    totals of the two progress bars.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ext._lightning._loader import live_sampler
from lightning_ext.data import AdaptiveBatchSampler, EpochPlan


def epoch_end(trainer: Trainer) -> int:
    """Batches of the running epoch, ``limit_train_batches`` included."""
    sampler = live_sampler(trainer)
    if sampler is None:
        return int(trainer.num_training_batches)
    return _limited(trainer, sampler.plan)


def epoch_is_open(trainer: Trainer) -> bool:
    """Whether an epoch has begun and is not yet over, or counted as over."""
    counts: Any = trainer.fit_loop.epoch_progress.current
    return bool(counts.ready == counts.started and counts.processed < counts.started)


def sync_lengths(trainer: Trainer, num_batches: int | None = None) -> None:
    """Tells every part of the Trainer how many batches the running epoch has.

    Args:
        trainer: The Trainer in fit.
        num_batches: The number, by default what the sampler and ``limit_train_batches`` give.
    """
    total = epoch_end(trainer) if num_batches is None else num_batches
    loop, combined = trainer.fit_loop, trainer.fit_loop._combined_loader
    if combined is not None:
        combined.limits = [total]
        if combined._iterator is not None:
            combined._iterator.limits = [total]
    if loop._data_fetcher is not None:
        loop._data_fetcher.length = total
    loop.max_batches = total
    _sync_validation(trainer, total)
    _sync_progress_bar(trainer, total)


def expect_batches(trainer: Trainer, sampler: AdaptiveBatchSampler) -> None:
    """Sets the limits that the fetcher reads when it begins an epoch."""
    combined = trainer.fit_loop._combined_loader
    if combined is not None:
        combined.limits = [_limited(trainer, sampler.plan)]


def _limited(trainer: Trainer, plan: EpochPlan) -> int:
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and len(plan.segments) > 1:
        # A fraction means samples: as many as it was when the epoch began.
        begun = plan.resized(*plan.segments[0])
        batches = int(begun.num_batches * limit)
        return plan.batches_to_cover(begun.span(batches - 1)[1])
    return int(_parse_num_batches(RunningStage.TRAINING, plan.num_batches, limit))


def _sync_validation(trainer: Trainer, total: int) -> None:
    interval = trainer.val_check_interval
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return
    if isinstance(interval, float):
        trainer.val_check_batch = _whole_windows(trainer, int(total * interval), total)
    elif trainer.check_val_every_n_epoch is not None and interval > total and _validates(trainer):
        rank_zero_warn(
            f"val_check_interval={interval} counts batches, and this epoch now has {total}: it"
            " ends without validation. Hint: give the interval as a fraction."
        )


def _whole_windows(trainer: Trainer, batches: int, total: int) -> int:
    """Rounds such that validation, and with it a checkpoint, cuts no gradient in two."""
    sampler = live_sampler(trainer)
    if sampler is None or batches >= total:
        return max(1, batches)
    if all(segment[1:] == sampler.user_sizes for segment in sampler.plan.segments):
        return max(1, batches)
    common = math.lcm(*(segment.accumulate for segment in sampler.plan.segments))
    return max(batches - batches % common, min(common, total))


def _validates(trainer: Trainer) -> bool:
    return trainer.enable_validation and not math.isinf(trainer.val_check_batch or math.inf)


def _sync_progress_bar(trainer: Trainer, total: int) -> None:
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar._train_progress_bar is not None:
        bar.train_progress_bar.total = total
        bar.train_progress_bar.refresh()
    if isinstance(bar, RichProgressBar) and bar.progress and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, total=total)
