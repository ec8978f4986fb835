"""Goes on from a checkpoint with the very next sample and the very next random number.

Private: ``fit_loop._data_fetcher``, ``fit_loop.epoch_progress``, ``fit_loop.epoch_loop`` with its
    restart stage, ``val_loop``, ``_batches_that_stepped``, and the loader protocol ``_Stateful``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_ext._lightning._lengths import (
    epoch_end,
    epoch_is_open,
    expect_batches,
    sync_lengths,
)
from lightning_ext._lightning._loader import live_sampler
from lightning_ext.data import AdaptiveBatchSampler

_STATEFUL = ("state_dict", "load_state_dict")


def resume_position(
    trainer: Trainer, position: dict[str, Any] | None, restore_generators: Callable[[], None]
) -> None:
    """Puts the sampler, the fetcher and the generators where the checkpoint left them.

    To be called in ``on_train_start``. Lightning has by then drawn an iterator, and with it a
    random number, before anything was restored. Inside an epoch the iterator is drawn again and
    the generators restored after that; at the end of one the generators come first, since the
    uninterrupted run draws its iterator after the checkpoint.

    Args:
        trainer: The Trainer in ``on_train_start``.
        position: State of the sampler, ``None`` in a checkpoint that has none.
        restore_generators: Restores the random state.
    """
    loop, sampler = trainer.fit_loop, live_sampler(trainer)
    if sampler is None:
        return
    sampler.load_state_dict(position or _position_at(sampler, loop.epoch_loop.batch_idx + 1))
    _claim_resumable(trainer, sampler)
    if sampler.consumed < epoch_end(trainer):
        _draw_iterator(trainer, sampler)
        restore_generators()
        sync_lengths(trainer)
        _validate_if_due(trainer)
        return
    restore_generators()
    sync_lengths(trainer)
    _validate_if_due(trainer)
    if not epoch_is_open(trainer):
        sampler.next_epoch()
        _draw_iterator(trainer, sampler)


def sync_first_batch(trainer: Trainer) -> None:
    """Catches up, in ``on_train_batch_start``, with what could not be set before it."""
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        for name in _STATEFUL:
            loader.__dict__.pop(name, None)
    if trainer.num_training_batches != epoch_end(trainer):
        sync_lengths(trainer)


def _position_at(sampler: AdaptiveBatchSampler, batches: int) -> dict[str, Any]:
    return sampler.state_dict() | {"consumed": batches}


def _draw_iterator(trainer: Trainer, sampler: AdaptiveBatchSampler) -> None:
    expect_batches(trainer, sampler)
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def _claim_resumable(trainer: Trainer, sampler: AdaptiveBatchSampler) -> None:
    # Lightning warns that a loader without these cannot resume; ours just did. They go again with
    # the first batch, lest checkpoints demand them of a run without this sampler.
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        loader.__dict__ |= {name: getattr(sampler, name) for name in _STATEFUL}


def _validate_if_due(trainer: Trainer) -> None:
    """Runs the validation that followed the saved step, which Lightning leaves out on resume."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not loop.restarted_on_train_batch_end:
        return
    epochs: Any = trainer.fit_loop.epoch_progress.current
    closed = not epoch_is_open(trainer)  # its last batch counts as its end while being resumed
    epochs.processed -= closed
    if loop._should_check_val_fx(fetcher):
        stepped = loop._batches_that_stepped
        loop.val_loop.restarting = False
        loop.on_advance_end(fetcher)
        loop._batches_that_stepped = stepped
    epochs.processed += closed
