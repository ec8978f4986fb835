"""Weight decay in phases.

Source: Shen et al. 2023, arXiv:2309.10818 (SlimPajama-DC), section on large-batch training:
    a large batch with weight decay 0, then 0.5, then 0.1.
Differs: the phases begin at samples that the user gives; the paper names none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer

from lightning_ext.optim._schedules._sample_schedule import SampleSchedule


class WeightDecaySchedule(SampleSchedule):
    r"""Writes the ``weight_decay`` of the groups, constant in each of several phases.

    Groups that are built with ``weight_decay=0`` (biases, norms) are left alone, and so is the
    learning rate: use it beside a schedule for that one, as a second scheduler of the optimizer.

    Args:
        optimizer: The wrapped optimizer.
        phases: The weight decay from a number of samples seen on, the first from 0 on, as in
            ``{0: 0.0, 50_000: 0.5, 400_000: 0.1}``.
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: The phases are out of order or range, or no group has weight decay.

    Example:
        >>> import torch
        >>> from lightning_ext.optim import WeightDecaySchedule
        >>> parameters = [torch.nn.Parameter(torch.ones(1))]
        >>> optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
        >>> schedule = WeightDecaySchedule(optimizer, {0: 0.0, 10: 0.5}, samples_per_step=10)
        >>> optimizer.step()
        >>> schedule.step()
        >>> optimizer.param_groups[0]["weight_decay"]
        0.5
    """

    def __init__(
        self,
        optimizer: Optimizer,
        phases: Mapping[int, float],
        *,
        samples_per_step: int | None = None,
    ) -> None:
        _check_phases(phases)
        self._decayed = [bool(group.get("weight_decay")) for group in optimizer.param_groups]
        if not any(self._decayed):
            raise ValueError(
                "No group of the optimizer has weight decay, so there is none to schedule; groups"
                " with weight_decay=0 are left alone. Hint: build it with the largest value."
            )
        self._decay = partial(_at, list(phases), list(phases.values()))
        super().__init__(optimizer, _unchanged, samples_per_step=samples_per_step)

    def get_lr(self) -> list[Any]:
        """The learning rates as they are; sets the weight decay."""
        super().get_lr()  # counts
        decay = self._decay(self.samples_seen)
        for group, decayed in zip(self.optimizer.param_groups, self._decayed, strict=True):
            if decayed:
                group["weight_decay"] = decay
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and the functions."""
        return {key: value for key, value in super().state_dict().items() if key != "_decay"}


def _unchanged(samples: float) -> float:
    return 1.0


def _at(starts: list[int], values: list[float], samples: float) -> float:
    return values[max(0, bisect_right(starts, samples) - 1)]


def _check_phases(phases: Mapping[int, float]) -> None:
    if not phases or next(iter(phases)) != 0:
        raise ValueError(f"phases was {dict(phases)}; the first phase begins at 0 samples.")
    for before, after in pairwise(phases):
        if before >= after:
            raise ValueError(
                f"phases goes back from {before} to {after} samples; starts must increase."
            )
    for decay in phases.values():
        if not 0 <= decay < float("inf"):
            raise ValueError(f"phases has the weight decay {decay}; it must be at least 0.")
