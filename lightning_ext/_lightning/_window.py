"""What the running batch counts in its optimizer step."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_ext._lightning._lengths import epoch_end
from lightning_ext._lightning._loader import live_sampler
from lightning_ext._lightning._view import view


class BatchShare(NamedTuple):
    """Size and weight of one batch of one rank.

    Args:
        local: Samples on this rank; 0 where it repeats another rank's sample.
        across_ranks: Samples on all data-parallel ranks.
        window: Samples on all ranks in all batches of the optimizer step.
        loss_weight: Factor by which this rank's loss is multiplied.
        whole: Whether every batch of the optimizer step has the size that was planned.
    """

    local: int
    across_ranks: int
    window: int
    loss_weight: float
    whole: bool = True


def batch_share(trainer: Trainer, batch: Any, batch_idx: int) -> BatchShare:
    """Reads the share from the train loader's sampler, or from the batch where it has none.

    Args:
        trainer: The Trainer in fit.
        batch: The batch; without an adaptive sampler its first tensor counts the samples.
        batch_idx: Index of the batch in the epoch.
    """
    sampler = live_sampler(trainer)
    if sampler is None or not sampler.tracked:
        local = extract_batch_size(batch)
        ranks = view(trainer).data_parallel_size
        return BatchShare(
            local, local * ranks, local * ranks * trainer.accumulate_grad_batches, 1.0
        )
    share = sampler.share(batch_idx, epoch_end(trainer))
    weight = share.loss_weight(rescale_last_window=sampler.rescale_last_window)
    return BatchShare(share.local, share.across_ranks, share.window, weight, share.whole)


def reference_batch(trainer: Trainer, batch: Any) -> int:
    """The global batch that the user's hyper-parameters belong to.

    Args:
        trainer: The Trainer in fit.
        batch: The first batch of the first fit.
    """
    sampler = live_sampler(trainer)
    if sampler is not None and sampler.reference_batch is not None:
        return sampler.reference_batch
    ranks = view(trainer).data_parallel_size
    return extract_batch_size(batch) * ranks * trainer.accumulate_grad_batches
