"""Goes on from a checkpoint with the very next sample and the very next random number.

Private: ``fit_loop._data_fetcher``, ``epoch_progress``, the restart stages of ``fit_loop``,
    ``epoch_loop`` and ``val_loop``, ``_batches_that_stepped``, the loader protocol ``_Stateful``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage

from lightning_ext._lightning._lengths import (
    epoch_end,
    epoch_is_open,
    expect_batches,
    sync_lengths,
)
from lightning_ext._lightning._loader import live_sampler
from lightning_ext._lightning._monitored import plateaus_are_monitored
from lightning_ext.data import AdaptiveBatchSampler

_STATEFUL = ("state_dict", "load_state_dict")


def resume_position(
    trainer: Trainer,
    position: dict[str, Any] | None,
    restore_generators: Callable[[], None],
    before_drawing: Callable[[], None],
) -> None:
    """Puts the sampler, the fetcher and the generators where the checkpoint left them.

    To be called in ``on_train_start``. Lightning has by then drawn an iterator, and with it a
    random number, before anything was restored. Inside an epoch the iterator is drawn again and
    the generators restored after that; at the end of one the loop is made to begin the next epoch
    as it always does, iterator included.

    Args:
        trainer: The Trainer in ``on_train_start``.
        position: State of the sampler, ``None`` in a checkpoint that has none.
        restore_generators: Restores the random state.
        before_drawing: Called with the sampler in its place, before a batch is drawn.
    """
    loop, sampler = trainer.fit_loop, live_sampler(trainer)
    if sampler is None:
        return
    sampler.load_state_dict(position or _position_at(sampler, loop.epoch_loop.batch_idx + 1))
    before_drawing()
    _claim_resumable(trainer, sampler)
    if sampler.consumed == 0 and trainer.current_epoch > 0:
        restore_generators()
        _forget_restart(trainer)
        return
    if sampler.consumed < epoch_end(trainer):
        sampler.cut_window()
        _draw_iterator(trainer, sampler)
        restore_generators()
        sync_lengths(trainer)
        _owe_validation(trainer)
        return
    restore_generators()
    sync_lengths(trainer)
    if not epoch_is_open(trainer):
        _finish_epoch(trainer)
        sampler.next_epoch()


def sync_first_batch(trainer: Trainer) -> None:
    """Catches up, in ``on_train_batch_start``, with what could not be set before it."""
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        for name in _STATEFUL:
            loader.__dict__.pop(name, None)
    if trainer.num_training_batches != epoch_end(trainer):
        sync_lengths(trainer)


def _position_at(sampler: AdaptiveBatchSampler, batches: int) -> dict[str, Any]:
    samples = sampler.plan.span(batches)[0]
    return sampler.state_dict() | {"consumed": batches, "consumed_samples": samples}


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


def _saved_after_step(trainer: Trainer) -> bool:
    """Whether the checkpoint was written in ``on_train_batch_end``, before what follows it."""
    return trainer.fit_loop.epoch_loop.restarted_on_train_batch_end


def _owe_validation(trainer: Trainer) -> None:
    """Has the loop run the validation that followed the saved step, and that it would leave out."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not _saved_after_step(trainer) or not loop._should_check_val_fx(fetcher):
        return
    loop.val_loop._restarting = False
    loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
    loop._batches_that_stepped -= 1  # counted when the restart is prepared, and after validation


def _finish_epoch(trainer: Trainer) -> None:
    """Does what followed the last batch of an epoch, then lets the loop begin the next one.

    Lightning counts this epoch as over and would go on without validation, without stepping the
    schedulers that wait for it, and without ``on_train_epoch_start``.
    """
    loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
    if fetcher is not None and _saved_after_step(trainer):
        counts: Any = loop.epoch_progress.current
        counts.processed -= 1
        counts.completed -= 1
        loop.epoch_loop.batch_progress.increment_completed()
        loop.epoch_loop.val_loop.on_iteration_done()
        loop.epoch_loop.on_advance_end(fetcher)
        counts.processed += 1
        if plateaus_are_monitored(trainer):
            loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        counts.completed += 1
    if loop.epoch_progress.current.completed < loop.epoch_progress.current.ready:
        loop.epoch_progress.increment_completed()
    _forget_restart(trainer)


def _forget_restart(trainer: Trainer) -> None:
    """Has the loop begin its next epoch as it begins any, iterator included."""
    loop = trainer.fit_loop
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part.on_iteration_done()
