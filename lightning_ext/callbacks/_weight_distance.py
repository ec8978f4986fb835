"""Logs how far the weights have come from where they began.

Source: Hoffer et al. 2017 (arXiv:1705.08741, section 3): ‖w_t − w_0‖ grows as log t in the early
    high-learning-rate phase, whatever the batch, and faster in t where the learning rate grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ext import _lightning
from lightning_ext._lightning import View, view
from lightning_ext.callbacks._arguments import require_count
from lightning_ext.callbacks._reuse import begins_anew
from lightning_ext.scaling import LogFit

_CHECKPOINT_KEY = "lightning_ext.weight_distance"


class WeightDistance(Callback):
    r"""Measures :math:`\|w_t - w_0\|` and fits it by a line over :math:`\log t`.

    Logs ``weight_distance``, ``weight_distance_slope`` (by how much it grows while the optimizer
    steps grow e-fold), ``weight_distance_slope_samples`` (while the samples do; the same where the
    batch is constant) and ``weight_distance_r2`` (how straight the line over steps is).

    A copy of the first weights is kept, in their precision, and stored in checkpoints.

    Args:
        every_n_steps: Measure every n-th step that the optimizer took.
        after_steps: Leave the first steps out of the fit.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, every_n_steps: int = 10, *, after_steps: int = 0) -> None:
        require_count("every_n_steps", every_n_steps)
        require_count("after_steps", after_steps, least=0)
        self.every_n_steps = every_n_steps
        self.after_steps = after_steps
        self._key = self._generate_state_key(every_n_steps=every_n_steps, after_steps=after_steps)
        self._counter: _lightning.StepCounter | None = None
        self._reset()

    def _reset(self) -> None:
        """Forgets everything that a run has brought."""
        self._start: dict[str, Tensor] = {}
        self._steps = 0
        self._samples = 0
        self._window = 0  # samples of the running step
        self._distance: float | None = None
        self._by_steps = LogFit()
        self._by_samples = LogFit()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the optimizer; a fit finds it again."""
        return self.__dict__ | {"_counter": None}

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._key

    def values(self) -> dict[str, float]:
        """Returns what there is to log."""
        found = {
            "weight_distance": self._distance,
            "weight_distance_slope": self._by_steps.slope,
            "weight_distance_slope_samples": self._by_samples.slope,
            "weight_distance_r2": self._by_steps.r_squared,
        }
        return {name: value for name, value in found.items() if value is not None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what was measured on another module."""
        if stage == "fit" and begins_anew(self, pl_module):
            self._reset()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the first weights of the run that goes on."""
        saved = checkpoint.get(_CHECKPOINT_KEY, {}).get(self.state_key)
        if saved is not None:
            seen = view(trainer)
            like = {n: p.detach() for n, p in _trained(seen).items() if n in saved}
            # A module in double precision is widened only after checkpoints are loaded.
            wide = {n: x.to(torch.promote_types(x.dtype, saved[n].dtype)) for n, x in like.items()}
            self._start = seen.load_tensors(saved, wide)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores the first weights, whole."""
        if self._start:
            places = checkpoint.setdefault(_CHECKPOINT_KEY, {})
            places[self.state_key] = view(trainer).save_tensors(self._start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the weights, unless they are known, and watches the optimizer."""
        present = _trained(view(trainer))
        self._start = {
            name: self._start[name].to(p.device) if name in self._start else p.detach().clone()
            for name, p in present.items()
        }
        self._counter = _lightning.StepCounter(trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the samples of the step."""
        self._window += _lightning.batch_share(trainer, batch, batch_idx).across_ranks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures after every n-th step, and logs where the Trainer does."""
        taken = 0 if self._counter is None else self._counter.take()
        if taken > 0:
            self._count(taken, view(trainer))
        if self._distance is not None and _lightning.logs_now(trainer):
            pl_module.log_dict(self.values(), on_step=True, on_epoch=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stops watching the optimizer."""
        self._unwatch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops watching the optimizer."""
        self._unwatch()

    def state_dict(self) -> dict[str, Any]:
        """Counts and sums; the first weights have their own place in the checkpoint."""
        distance = -1.0 if self._distance is None else self._distance
        numbers = [distance, *self._by_steps, *self._by_samples]
        history = torch.tensor(numbers, dtype=torch.float64)
        counts = {"steps": self._steps, "samples": self._samples, "window": self._window}
        return {"history": history, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from them."""
        distance, *sums = state_dict["history"].tolist()
        self._distance = None if distance < 0 else distance
        half = len(LogFit._fields)
        self._by_steps, self._by_samples = LogFit(*sums[:half]), LogFit(*sums[half:])
        self._steps = state_dict["steps"]
        self._samples = state_dict["samples"]
        self._window = state_dict["window"]

    def _count(self, taken: int, seen: View) -> None:
        self._samples += self._window
        self._window = 0
        before, self._steps = self._steps, self._steps + taken
        if before // self.every_n_steps == self._steps // self.every_n_steps:
            return
        present = _trained(seen)
        counted = {id(p) for p in seen.counted(list(present.values()))}
        own = {name: p for name, p in present.items() if id(p) in counted}
        self._distance = float(seen.sq_norm(_moved(own, self._start)).sqrt())
        if self._steps > self.after_steps:
            self._by_steps = self._by_steps.add(self._steps, self._distance)
            self._by_samples = self._by_samples.add(self._samples, self._distance)

    def _unwatch(self) -> None:
        if self._counter is not None:
            self._counter.detach()
        self._counter = None


def _trained(seen: View) -> dict[str, Tensor]:
    return {name: p for name, p in seen.local_parameters() if p.requires_grad}


def _moved(present: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> list[Tensor]:
    pairs = [(p.detach(), start[name]) for name, p in present.items() if name in start]
    return [p.to(_wide(p)) - first.to(_wide(first)) for p, first in pairs]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
