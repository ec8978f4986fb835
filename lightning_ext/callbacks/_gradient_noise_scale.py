"""Measures the gradient noise scale from the parts that a global batch has anyway.

Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2 and appendix A.1.
Differs: every micro-batch of every rank is a part, parts may differ in size, averages are taken
    before the ratio, and the estimate has a confidence interval.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext import scaling
from lightning_ext._lightning import (
    batch_share,
    gradient_scale,
    logs_now,
    step_gradient_scale,
    view,
)
from lightning_ext.callbacks._arguments import (
    require_bool,
    require_choice,
    require_count,
    require_number,
)
from lightning_ext.callbacks._gradient_parts import GradientParts
from lightning_ext.callbacks._reuse import begins_anew

_NEGLIGIBLE = 1e-6  # weight of a measurement that is old enough to be forgotten
_LONGEST = 10_000


class GradientNoiseScale(Callback):
    r"""Estimates :math:`B_{noise} = tr(\Sigma) / |G|^2` while training runs.

    The gradients of the micro-batches that are accumulated, and of the data-parallel ranks, are
    parts of the global batch; their squared norms and that of the whole give :math:`|G|^2` and
    :math:`tr(\Sigma)` without bias. Only norms are kept: one number per part. Gradients are taken
    as they are before clipping, freed of the gradient scaler's and the accumulation's factors.

    At the steps that the Trainer logs, it logs ``noise_scale``, ``noise_scale_low``,
    ``noise_scale_high``, ``grad_sq_norm``, ``grad_trace``, ``steps_over_min`` and
    ``samples_over_min``: what training at the present batch costs, in steps and in samples,
    relative to the least possible.

    Args:
        every_n_steps: Measure every n-th optimizer step.
        smoothing: Weight of a measurement relative to the next one, in (0, 1]; 1 weighs all alike.
        source: ``"micro_batches"`` (what ``"auto"`` means): every micro-batch of every rank.
        geometry: ``"euclidean"`` (what ``"auto"`` means): plain norms.
        per_group: Also log every value for each parameter group of the optimizer, as
            ``noise_scale_group_0`` and so on.
        prefix: What logged names begin with, to tell several of these callbacks apart.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: At the start of fit, if a global batch has one part only, or
            under manual optimization.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        smoothing: float = 0.99,
        *,
        source: Literal["auto", "micro_batches"] = "auto",
        geometry: Literal["auto", "euclidean"] = "auto",
        per_group: bool = False,
        prefix: str = "",
    ) -> None:
        require_choice("source", source, ("auto", "micro_batches"))
        require_choice("geometry", geometry, ("auto", "euclidean"))
        require_count("every_n_steps", every_n_steps)
        require_number("smoothing", smoothing, above=0, most=1)
        require_bool("per_group", per_group)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix was {prefix!r}; allowed is a string.")
        self.every_n_steps = every_n_steps
        self.smoothing = smoothing
        self.source = source
        self.geometry = geometry
        self.per_group = per_group
        self.prefix = prefix
        self._key = self._generate_state_key(
            every_n_steps=every_n_steps, smoothing=smoothing, per_group=per_group, prefix=prefix
        )
        self.measured = False
        self._rows: list[list[float]] = []
        self._windows = 0
        self._parts: GradientParts | None = None

    @property
    def state_key(self) -> str:
        """Tells several of these callbacks in one Trainer apart."""
        return self._key

    def estimate(self, group: int | None = None) -> scaling.NoiseScale:
        """Returns the present estimate.

        Args:
            group: A parameter group of the optimizer, or all of them (needs ``per_group=True``).

        Raises:
            ValueError: Nothing was measured yet, or there is no such group.
        """
        groups = len(self._rows[-1]) // 3 - 1 if self._rows else 0
        if group is not None and not 0 <= group < groups:
            raise ValueError(
                f"group was {group}; {groups} were measured. Hint: per_group=True, and estimate()"
                " after the first measurement."
            )
        first = 0 if group is None else 3 * (group + 1)
        history = [(row[first], row[first + 1], row[first + 2]) for row in self._rows]
        return scaling.noise_scale(history, smoothing=self.smoothing)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what was measured on another module."""
        if stage == "fit" and begins_anew(self, pl_module):
            self._rows, self._windows = [], 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there will be something to measure."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientNoiseScale reads the micro-batches of automatic optimization;"
                " automatic_optimization is False. Hint: let the Trainer call the optimizer."
            )
        if not any(group["params"] for o in trainer.optimizers for group in o.param_groups):
            raise MisconfigurationException(
                "GradientNoiseScale measures the parameters of the optimizer, and there is none."
                " Hint: configure_optimizers."
            )
        seen = view(trainer)
        if seen.accumulate * seen.data_parallel_size < 2:
            raise MisconfigurationException(
                "The gradient noise scale needs a global batch of at least two parts; there are"
                " accumulate_grad_batches=1 and one data-parallel rank. Hint:"
                " Trainer(accumulate_grad_batches=2)."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins a window, every n-th of them with hooks on the parameters."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._begin_window(trainer)
        if self._parts is not None:
            share = batch_share(trainer, batch, batch_idx)
            self._parts.begin(share.local, share.loss_weight)
            if not share.whole:  # other ranks × accumulation would cut it into other parts
                self._drop_window()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes one part."""
        if self._parts is not None:
            self._parts.end()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Brings the parts of all ranks together, with one read of the device."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        parts.detach()
        seen = view(trainer)
        whole = parts.whole(step_gradient_scale(trainer, optimizer))
        scale = gradient_scale(trainer)
        local = parts.table(seen.accumulate, seen.data_parallel_size, scale)
        if local is None:
            return
        # Every rank has equally many rows, and the same last one.
        tables = seen.gather(torch.cat([local, whole])).cpu()
        self._measure(tables[:, :-1].flatten(0, 1), tables[0, -1, 2:].tolist())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the present estimate."""
        if self._rows and logs_now(trainer):
            batch_size = self._rows[-1][2]
            pl_module.log_dict(self._values(batch_size), on_step=True, on_epoch=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Removes the hooks."""
        self._drop_window()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks."""
        self._drop_window()

    def state_dict(self) -> dict[str, Any]:
        """The measurements that still count."""
        history = torch.tensor(self._rows, dtype=torch.float64)
        return {"history": history, "windows": self._windows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the measurements of the checkpoint."""
        self._rows = state_dict["history"].tolist()
        self._windows = state_dict["windows"]

    def _begin_window(self, trainer: Trainer) -> None:
        self._drop_window()
        if self._windows % self.every_n_steps == 0:
            groups = [group["params"] for group in trainer.optimizers[0].param_groups]
            self._parts = GradientParts(groups)
        self._windows += 1

    def _drop_window(self) -> None:
        self.measured = False
        if self._parts is not None:
            self._parts.detach()
        self._parts = None

    def _measure(self, parts: Tensor, whole: list[float]) -> None:
        row = _statistics(parts.tolist(), whole, self.per_group)
        if row is None:
            return
        if self._rows and len(self._rows[0]) != len(row):
            self._rows.clear()  # the optimizer has other parameter groups now
        self._rows.append(row)
        del self._rows[: -_history_length(self.smoothing)]
        self.measured = True

    def _values(self, global_batch: float) -> dict[str, float]:
        values = _named(self.estimate(), global_batch, self.prefix, "")
        for group in range(len(self._rows[-1]) // 3 - 1):
            noise = self.estimate(group)
            values |= _named(noise, global_batch, self.prefix, f"_group_{group}")
        return values


def _statistics(
    parts: list[list[float]], whole: list[float], per_group: bool
) -> list[float] | None:
    """One measurement: three numbers for all parameters, then three for each group.

    ``None`` where it would mean nothing: fewer than two parts, a gradient that is not finite (a
    gradient scaler skips the step), or a whole that is not the samples' mean.
    """
    parts = [part for part in parts if part[0] > 0]
    sizes = [part[0] for part in parts]
    if len(parts) < 2 or not all(math.isfinite(x) for row in [*parts, whole] for x in row):
        return None
    mean_weight = sum(part[1] for part in parts)
    if any(
        not math.isclose(weight / size, mean_weight / sum(sizes), rel_tol=1e-6)
        for size, weight, *_ in parts
    ):
        return None
    squares = [part[2:] for part in parts]
    means = [value / mean_weight**2 for value in whole]
    row = _measurement([sum(square) for square in squares], sizes, sum(means))
    for group in range(len(means) if per_group else 0):
        row += _measurement([square[group] for square in squares], sizes, means[group])
    return row


def _measurement(part_sq_norms: list[float], sizes: list[float], whole: float) -> list[float]:
    return [*scaling.noise_statistics(part_sq_norms, sizes, whole), sum(sizes)]


def _named(
    noise: scaling.NoiseScale, global_batch: float, prefix: str, suffix: str
) -> dict[str, float]:
    efficiency = scaling.BatchEfficiency(math.nan, math.nan)
    if not math.isnan(noise.value):  # it is where all gradients are 0
        efficiency = scaling.batch_efficiency(global_batch, max(noise.value, 0.0))
    values = {
        "noise_scale": noise.value,
        "noise_scale_low": noise.low,
        "noise_scale_high": noise.high,
        "grad_sq_norm": noise.grad_sq_norm,
        "grad_trace": noise.grad_trace,
        "steps_over_min": efficiency.steps_over_min,
        "samples_over_min": efficiency.samples_over_min,
    }
    return {prefix + name + suffix: float(value) for name, value in values.items()}


def _history_length(smoothing: float) -> int:
    if smoothing == 1:
        return _LONGEST
    return min(_LONGEST, math.ceil(math.log(_NEGLIGIBLE) / math.log(smoothing)) + 1)
