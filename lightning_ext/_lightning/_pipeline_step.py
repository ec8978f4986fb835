"""A training step that runs its own backward pass, in Lightning's order of hooks.

Private: ``trainer.fit_loop._skip_backward``, with which the loop's closure is the step alone, and
    ``_on_before_zero_grad`` and ``_optimizer_zero_grad`` of its automatic optimization.
"""

from __future__ import annotations

from lightning.pytorch import Trainer


def run_backward_in_step(trainer: Trainer) -> None:
    """Has the fit leave zeroing of gradients and the backward pass to the training step.

    Args:
        trainer: With automatic optimization.
    """
    trainer.fit_loop._skip_backward = True


def zero_grad_of_window(trainer: Trainer) -> None:
    """Zeroes gradients before the first batch of an optimizer step, with the hooks of the loop.

    Args:
        trainer: In a training step.
    """
    epoch = trainer.fit_loop.epoch_loop
    batch_idx = epoch.batch_progress.current.ready - 1
    if batch_idx % trainer.accumulate_grad_batches:
        return
    loop = epoch.automatic_optimization
    (optimizer,) = trainer.optimizers
    loop._on_before_zero_grad(optimizer)
    loop._optimizer_zero_grad(batch_idx, optimizer)


def ends_window(trainer: Trainer) -> bool:
    """Whether the optimizer steps after the running batch.

    Args:
        trainer: In a training step.
    """
    return not trainer.fit_loop._should_accumulate()


def batches_before(trainer: Trainer) -> int:
    """Batches of the fit before the running one, over epochs and checkpoints.

    Args:
        trainer: In a training step.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
