"""A running mean of the training loss whose memory is counted in samples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ext import _lightning, scaling

_HALF_LIFE_BATCHES = 32  # reference batches after which a loss counts half


class RunningLoss:
    """Sums of losses and samples, the older the lighter; they stay on the device until read."""

    def __init__(self) -> None:
        self._sums: list[Tensor | float] = [0.0, 0.0]  # losses and samples, before this window
        self._window: list[Tensor | float] = [0.0, 0.0]

    def add(self, outputs: Any, samples: int, accumulate: int) -> None:
        """Adds the loss of so many samples, which the Trainer has divided, where it is finite."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor) or not samples:
            return
        value = loss.detach().to(_dtype(loss.device)) * accumulate
        finite = torch.isfinite(value)
        self._window[0] = self._window[0] + torch.where(finite, value, 0.0) * samples
        self._window[1] = self._window[1] + finite * samples

    def end_window(self, samples: int, reference_batch: int) -> None:
        """Ages what came before by one step of so many samples, over all ranks."""
        kept = scaling.half_life_to_decay(_HALF_LIFE_BATCHES * reference_batch, samples)
        self._sums = [old * kept + new for old, new in zip(self._sums, self._window, strict=True)]
        self._window = [0.0, 0.0]

    def mean(self, trainer: Trainer) -> float | None:
        """The mean over all ranks, ``None`` before the first loss."""
        device = trainer.strategy.root_device
        own = torch.tensor(self.state_dict(), device=device, dtype=_dtype(device))
        losses, samples = _lightning.view(trainer).gather(own).sum(0).tolist()
        return losses / samples if samples > 0 else None

    def state_dict(self) -> list[float]:
        """Both sums."""
        return [float(x) for x in self._sums]

    def load_state_dict(self, state: list[float]) -> None:
        """Goes on from both sums."""
        self._sums = [*state]


def _dtype(device: torch.device) -> torch.dtype:
    """What the sums are kept in: as exact as a checkpoint's numbers, but for MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
