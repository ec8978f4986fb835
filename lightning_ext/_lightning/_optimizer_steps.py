"""When an optimizer steps, whether it really did, and by what its gradients are scaled.

Private: ``fit_loop._should_accumulate``, ``epoch_loop._is_training_done``,
    ``_logger_connector.should_update_logs``, the precision plugin's ``scaler``, and
    ``_optimizer_handles_unscaling``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import Trainer
from torch.optim import Optimizer


def steps_now(trainer: Trainer) -> bool:
    """Whether the running batch ends its accumulation window."""
    return not trainer.fit_loop._should_accumulate()


def logs_now(trainer: Trainer) -> bool:
    """Whether what is logged in ``on_train_batch_end`` of this optimizer step will be seen.

    It will where the loggers are written, and at the end of an epoch or of the run, where others
    look at ``callback_metrics``. Logging a value costs a good part of a small step.
    """
    last = trainer.fit_loop.epoch_loop._is_training_done
    return steps_now(trainer) and (last or trainer._logger_connector.should_update_logs)


def gradient_scale(trainer: Trainer) -> float:
    """Factor that a gradient scaler has put on the loss, 1 where there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def step_gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Factor still on the gradients in ``on_before_optimizer_step``."""
    return gradient_scale(trainer) if _optimizer_handles_unscaling(optimizer) else 1.0


class StepCounter:
    """Counts the steps that an optimizer took; those that a gradient scaler skipped do not count.

    Args:
        optimizer: The optimizer to watch, until :meth:`detach`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.count = 0
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def take(self) -> int:
        """Steps since the last call."""
        taken, self.count = self.count, 0
        return taken

    def detach(self) -> None:
        """Stops counting."""
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Optimizers that unscale by themselves are called for skipped steps too, with this flag.
        found_inf = getattr(optimizer, "found_inf", None)
        if not (isinstance(found_inf, torch.Tensor) and bool(found_inf)):
            self.count += 1
