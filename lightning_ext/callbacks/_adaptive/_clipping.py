"""How many optimizer steps were clipped."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext._lightning import view


class ClippedFraction:
    """Counts steps, and those whose gradient norm is above the Trainer's ``gradient_clip_val``."""

    def __init__(self) -> None:
        self._steps = 0
        self._clipped: Tensor | int = 0  # on the device, so that counting does not wait for it

    def count(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Looks at the gradients of one step before they are clipped."""
        limit, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        if not limit or algorithm not in (None, "norm"):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._steps += 1
        self._clipped = self._clipped + (view(trainer).sq_norm(gradients) > limit**2)

    def values(self) -> dict[str, float]:
        """The fraction so far, nothing where the Trainer does not clip by norm."""
        return {"clipped_fraction": int(self._clipped) / self._steps} if self._steps else {}

    def state_dict(self) -> list[int]:
        """Both counts."""
        return [self._steps, int(self._clipped)]

    def load_state_dict(self, state: list[int]) -> None:
        """Goes on from both counts."""
        self._steps, self._clipped = state
