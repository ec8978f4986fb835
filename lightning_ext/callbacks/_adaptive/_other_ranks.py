"""A run that goes on with another number of data-parallel ranks keeps its global batch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_ext import _lightning
from lightning_ext.scaling import BatchSplit

if TYPE_CHECKING:
    from lightning_ext.callbacks._adaptive._running_batch import RunningBatch

_log = logging.getLogger("lightning_ext")


def ranks_ratio(batch: RunningBatch) -> float:
    """Data-parallel ranks that wrote the checkpoint, over those of now; 1 without one."""
    now = batch.controller.data_parallel_size
    return 1.0 if batch.position is None else batch.position["num_replicas"] / now


def keep_batch(trainer: Trainer, batch: RunningBatch) -> None:
    """Goes to the batch of the checkpoint, split over the ranks that there are now.

    What is left of a window that the checkpoint cut keeps its micro-batch and accumulation, so that
    it is larger or smaller by the ratio of ranks, and its learning rate with it.

    Args:
        trainer: The Trainer in ``on_train_start``, with the sampler where the checkpoint left it
            and no batch drawn.
        batch: The running one.
    """
    now = batch.controller.data_parallel_size
    before = round(ranks_ratio(batch) * now)
    if before == now:
        return
    kept = batch.in_force.micro_batch * batch.in_force.accumulate * before
    split = _split(batch, kept)
    made = batch.controller.global_batch(split)
    if made != kept:
        rank_zero_warn(
            f"The checkpoint's global batch of {kept} cannot be made of {now} ranks × micro-batches"
            f" of {split.micro_batch}: {made} is used. Hint: a number of ranks that divides it."
        )
    batch.sampler.forget_pending()  # it was asked for in the sizes of the ranks before
    _lightning.view(trainer).set_micro_batch(split.micro_batch, accumulate=split.accumulate)
    batch.apply_due(trainer, batch.sampler.consumed)
    message = "global batch %d on %d ranks goes on as %d on %d: micro-batch %d, accumulate %d"
    rank_zero_only(_log.info)(message, kept, before, made, now, *split)


def _split(batch: RunningBatch, kept: int) -> BatchSplit:
    """The same micro-batch where that makes the batch, else what the rule's sizes allow."""
    controller, micro_batch = batch.controller, batch.in_force.micro_batch
    passes, rest = divmod(kept, micro_batch * controller.data_parallel_size)
    if passes and not rest and passes % controller.unit == 0:
        return BatchSplit(micro_batch, passes)
    return controller.made_of(kept)
