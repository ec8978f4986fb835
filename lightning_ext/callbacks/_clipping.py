"""How many optimizer steps were clipped."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_ext._lightning import step_gradient_scale, view


class ClippedFraction:
    """Counts steps, and those whose gradient norm is above the Trainer's ``gradient_clip_val``."""

    def __init__(self) -> None:
        self._steps = 0
        self._clipped = 0

    def count(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Looks at the gradients of one step before they are clipped."""
        limit, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        if not limit or algorithm not in (None, "norm"):
            return
        gradients = [
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        limit = limit * step_gradient_scale(trainer, optimizer)
        self._steps += 1
        self._clipped += int(view(trainer).sq_norm(gradients) > limit**2)

    def values(self) -> dict[str, float]:
        """The fraction so far, nothing where the Trainer does not clip by norm."""
        return {"clipped_fraction": self._clipped / self._steps} if self._steps else {}

    def state_dict(self) -> list[int]:
        """Both counts."""
        return [self._steps, self._clipped]

    def load_state_dict(self, state: list[int]) -> None:
        """Goes on from both counts."""
        self._steps, self._clipped = state
