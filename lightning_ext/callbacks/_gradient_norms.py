"""Records the gradient norms of a run, and makes a learning-rate schedule of them.

Source: Defazio et al. 2023, arXiv:2310.07831, section 3 (schedule refinement).
Differs: the positions of the table count samples. A run whose batch changed is not refined:
    E|g|² = |G|² + S/B, so that its norms would tell of the batch.
"""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Optimizer, RMSprop, Rprop

from lightning_ext import scaling
from lightning_ext._lightning import BatchShare, View, batch_share, step_gradient_scale, view
from lightning_ext.callbacks._arguments import require_choice
from lightning_ext.callbacks._reuse import begins_anew
from lightning_ext.optim import base_optimizer

_COORDINATE_WISE = (Adadelta, Adafactor, Adagrad, RMSprop, Rprop)  # those without betas
_PENDING = 256  # steps between two reads of the device
_CHANGED = (
    "the global batch changed while they were recorded: gradient norms depend on it"
    " (E|g|² = |G|² + S/B), so a schedule made of them would follow the batch instead of the run."
    " Hint: record a run at a constant batch"
)


class GradientNormRecorder(Callback):
    r"""Records the gradient norm of every optimizer step, for a refined schedule of the next run.

    The gradient is the whole one: after accumulation and the all-reduce of the ranks, free of the
    gradient scaler's factor, and before clipping. Steps whose gradient is not finite are left
    out. The norms wait on the device and are read every 256 steps.

    A run like the recorded one then uses the table with
    :class:`~lightning_ext.optim.RefinedSchedule`. Record at a constant batch: after a change of
    the batch :meth:`schedule` refuses, and with a ``path`` the first change warns. A shorter last
    step of an epoch is no change.

    Args:
        path: Where the table is written when fit has ended; ``None`` writes nothing.
        norm: ``"l2"`` (for SGD), ``"l1"`` (for Adam, Lion and other optimizers that work by
            coordinate), or ``"auto"``, by the class of the optimizer.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, under manual optimization, or where the
            class of the optimizer does not tell which norm to take.
    """

    def __init__(
        self, path: str | Path | None = None, *, norm: Literal["auto", "l1", "l2"] = "auto"
    ) -> None:
        require_choice("norm", norm, ("auto", "l1", "l2"))
        self.path = None if path is None else Path(path)
        self.norm = norm
        self._key = self._generate_state_key(norm=norm)
        self._share: BatchShare | None = None
        self._reset()

    def _reset(self) -> None:
        """Forgets everything that a run has brought."""
        self._chosen: str | None = None
        self._steps: list[list[float]] = []  # norm and global batch of each
        self._pending: list[Tensor] = []
        self._batches: list[int] = []  # of the pending norms
        self._changed = False

    @property
    def state_key(self) -> str:
        """Tells recorders of different norms in one Trainer apart."""
        return self._key

    def schedule(self, *, width: float = 0.1) -> scaling.FactorTable:
        """Returns the table that the recorded norms make.

        Args:
            width: Of the median that smooths them, as a share of the run.

        Raises:
            ValueError: Fewer than two steps, or the batch changed.
        """
        self._read()
        if self._changed:
            raise ValueError(f"The gradient norms make no schedule, because {_CHANGED}.")
        starts = accumulate((batch for _, batch in self._steps), initial=0.0)
        points = list(zip(starts, (norm for norm, _ in self._steps), strict=False))
        finite = [(start, norm) for start, norm in points if math.isfinite(norm)]
        norm = self._chosen or "l2"
        factors = scaling.refined_factors([g for _, g in finite], width=width, norm=norm)
        positions = tuple(start for start, _ in finite)
        return scaling.FactorTable(positions, tuple(factors), int(self._steps[0][1]))

    def save(self, path: str | Path, *, width: float = 0.1) -> None:
        """Writes the table, for :meth:`lightning_ext.optim.RefinedSchedule.from_file`.

        Args:
            path: The file; one process is enough.
            width: As in :meth:`schedule`.

        Raises:
            ValueError: As in :meth:`schedule`.
        """
        text = self.schedule(width=width).to_json()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what was recorded on another module."""
        if stage == "fit" and begins_anew(self, pl_module):
            self._reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the norm."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientNormRecorder records the steps of automatic optimization;"
                " automatic_optimization is False. Hint: let the Trainer call the optimizer."
            )
        chosen = self.norm if self.norm != "auto" else _norm_of(trainer.optimizers[0])
        if self._chosen not in (None, chosen):
            raise MisconfigurationException(
                f"The checkpoint holds {self._chosen} norms, and norm={self.norm!r} means {chosen}"
                f" for this optimizer. Hint: GradientNormRecorder(norm={self._chosen!r})."
            )
        self._chosen = chosen

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reads the global batch of the coming step."""
        self._share = batch_share(trainer, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Notes the norm, without waiting for the device."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        seen = view(trainer)
        if not (gradients or seen.cuts_batches) or self._share is None:
            return
        norm = _l1_norm if self._chosen == "l1" else _l2_norm
        scale = step_gradient_scale(trainer, optimizer)
        self._pending.append(norm(seen, gradients) / scale)
        self._batches.append(self._share.window)
        if self._share.whole and not trainer.is_last_batch:
            self._compare(self._share.window)
        if len(self._pending) >= _PENDING:
            self._read()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table."""
        self._read()
        if self.path is None or not trainer.is_global_zero or self._changed:
            return
        usable = sum(math.isfinite(norm) and norm > 0 for norm, _ in self._steps)
        if usable < 2:
            rank_zero_warn(
                f"GradientNormRecorder wrote no {self.path}: {usable} steps had a gradient that is"
                " finite and not 0, and a schedule needs two."
            )
            return
        self.save(self.path)

    def state_dict(self) -> dict[str, Any]:
        """The norm and the batch of every step."""
        self._read()
        history = torch.tensor(self._steps, dtype=torch.float64).reshape(-1, 2)
        return {"history": history, "norm": self._chosen, "changed": self._changed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the steps of a checkpoint."""
        self._reset()
        self._steps = state_dict["history"].tolist()
        self._chosen = state_dict["norm"]
        self._changed = state_dict["changed"]

    def _compare(self, global_batch: int) -> None:
        first = self._steps[0][1] if self._steps else self._batches[0]
        if self._changed or global_batch == first:
            return
        self._changed = True
        if self.path is not None:
            rank_zero_warn(
                f"GradientNormRecorder will write no {self.path}, because {_CHANGED}. The first"
                f" step had {first:.0f} samples, this one has {global_batch}."
            )

    def _read(self) -> None:
        if self._pending:
            norms = torch.stack(self._pending).double().tolist()
            self._steps += [[norm, float(b)] for norm, b in zip(norms, self._batches, strict=True)]
        self._pending, self._batches = [], []


def _norm_of(optimizer: Optimizer) -> str:
    optimizer = base_optimizer(optimizer)
    if isinstance(optimizer, (SGD, ASGD)):
        return "l2"
    if all("betas" in group for group in optimizer.param_groups):
        return "l1"
    if isinstance(optimizer, _COORDINATE_WISE):
        return "l1"
    raise MisconfigurationException(
        f"norm='auto' does not know {type(optimizer).__name__}. Allowed are 'l2', for an optimizer"
        " that moves along the gradient, and 'l1', for one that scales every coordinate by"
        " itself. Hint: GradientNormRecorder(norm='l2')."
    )


def _l2_norm(seen: View, gradients: list[Tensor]) -> Tensor:
    return seen.sq_norm(gradients).sqrt()


def _l1_norm(seen: View, gradients: list[Tensor]) -> Tensor:
    """The roots of the tensors' sums, so that the view adds the sums over ranks that split them."""
    sums = [_abs_sum(gradient) for gradient in seen.counted(gradients)]
    return seen.sq_norm([torch.stack(sums).sqrt()] if sums else [])


def _abs_sum(gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, 1, dtype=wide)
