"""Faults of one rank in the middle of a step."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from harness._nodes import cut_link

FaultKind = Literal["die", "hang", "cut"]


class Fault(Callback):
    """Lets one rank fail in the backward pass of a step.

    Args:
        kind: `"die"` (killed, without a word), `"hang"` (goes on after `seconds`), or `"cut"` (its
            node's link goes down; under `run_on_nodes`).
        rank: Which one.
        step: `trainer.global_step` at that time.
        seconds: Of the hang.

    Attributes:
        since: `time.monotonic()` of this rank at the beginning of that step.
    """

    def __init__(
        self, kind: FaultKind, *, rank: int = 1, step: int = 4, seconds: float = 20.0
    ) -> None:
        self.kind = kind
        self.rank, self.step, self.seconds = rank, step, seconds
        self.since = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Notes the time; a rank may lose the others before its own backward pass."""
        if trainer.global_step == self.step:
            self.since = time.monotonic()

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Waits for the gradient of the loss."""
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            loss.register_hook(self._strike)

    def _strike(self, grad: Any) -> None:
        if self.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "hang":
            time.sleep(self.seconds)
        else:
            cut_link()
