"""The metrics that schedulers wait for, which Lightning's checkpoints leave out.

Private: ``_logger_connector._callback_metrics``, ``fit_loop._restarting``.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer


def monitored_metrics(trainer: Trainer) -> dict[str, float]:
    """Present values of what ``ReduceLROnPlateau`` schedulers monitor, as far as they are known."""
    known = trainer.callback_metrics
    return {name: float(known[name]) for name in _monitors(trainer) if name in known}


def restore_monitored_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Makes values of the checkpoint known again, until they are logged anew."""
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer._logger_connector._callback_metrics.update(values)


def plateaus_are_monitored(trainer: Trainer) -> bool:
    """Whether every scheduler that waits for a metric would find it."""
    return all(name in trainer.callback_metrics for name in _monitors(trainer))


def step_plateau_schedulers(trainer: Trainer) -> None:
    """Lets schedulers that watch a metric step at the end of a resumed epoch too.

    To be called in ``on_train_epoch_end``. Lightning leaves them out there, since their metric may
    be unknown; where it is known, the uninterrupted run has stepped them.
    """
    if plateaus_are_monitored(trainer):
        trainer.fit_loop._restarting = False


def _monitors(trainer: Trainer) -> list[str]:
    configs = trainer.lr_scheduler_configs
    return [str(config.monitor) for config in configs if config.reduce_on_plateau]
