"""Learning-rate schedules by samples that have a name.

Source: the functions of the same names in :mod:`lightning_ext.scaling`, which give their papers.
Differs: as :class:`~lightning_ext.optim.SampleSchedule` does, they count samples, so that the
    learning rate at a position does not depend on the batch, nor on its changes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_ext import scaling
from lightning_ext.optim._schedules._sample_schedule import SampleSchedule


class SampleWarmup(SampleSchedule):
    r"""Raises the learning rate in a line, from ``start`` times the optimizer's to the optimizer's.

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak.
        warmup_samples: Length of the ramp.
        start: Factor of the first step, in [0, 1]; 0 makes it a step of length 0.
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> import torch
        >>> from lightning_ext.optim import SampleWarmup
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = SampleWarmup(optimizer, warmup_samples=40, samples_per_step=10)
        >>> optimizer.step()
        >>> schedule.step()
        >>> schedule.get_last_lr()
        [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_samples: int,
        start: float = 0.0,
        samples_per_step: int | None = None,
    ) -> None:
        factor = partial(scaling.warmup_factor, warmup_samples=warmup_samples, start=start)
        super().__init__(optimizer, factor, samples_per_step=samples_per_step)


class SampleCosine(SampleSchedule):
    r"""Warms up, then follows half a cosine down to ``final`` times the peak.

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak.
        total_samples: Samples of the run, the warm-up included.
        warmup_samples: Length of the warm-up.
        final: Factor at the end and after it, in [0, 1].
        start: Factor of the first step if there is a warm-up, in [0, 1].
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: A value out of range, or a warm-up longer than the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_samples: int,
        warmup_samples: int = 0,
        final: float = 0.0,
        start: float = 0.0,
        samples_per_step: int | None = None,
    ) -> None:
        factor = partial(
            scaling.cosine_factor,
            total_samples=total_samples,
            warmup_samples=warmup_samples,
            final=final,
            start=start,
        )
        super().__init__(optimizer, factor, samples_per_step=samples_per_step)


class SampleLinear(SampleSchedule):
    r"""Warms up, then goes down in a line to ``final`` times the peak.

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak.
        total_samples: Samples of the run, the warm-up included.
        warmup_samples: Length of the warm-up.
        final: Factor at the end and after it, in [0, 1].
        start: Factor of the first step if there is a warm-up, in [0, 1].
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: A value out of range, or a warm-up longer than the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_samples: int,
        warmup_samples: int = 0,
        final: float = 0.0,
        start: float = 0.0,
        samples_per_step: int | None = None,
    ) -> None:
        factor = partial(
            scaling.linear_factor,
            total_samples=total_samples,
            warmup_samples=warmup_samples,
            final=final,
            start=start,
        )
        super().__init__(optimizer, factor, samples_per_step=samples_per_step)


class SampleWSD(SampleSchedule):
    r"""Warms up, stays, and decays at the end (warmup–stable–decay).

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak.
        total_samples: Samples of the run.
        warmup_samples: Length of the warm-up.
        decay_samples: Length of the decay.
        final: Factor at the end and after it, in [0, 1].
        start: Factor of the first step if there is a warm-up, in [0, 1].
        shape: Of the decay, ``"linear"`` or ``"sqrt"`` (1 − √x).
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: A value out of range, or phases longer than the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_samples: int,
        warmup_samples: int,
        decay_samples: int,
        final: float = 0.0,
        start: float = 0.0,
        shape: Literal["linear", "sqrt"] = "linear",
        samples_per_step: int | None = None,
    ) -> None:
        factor = partial(
            scaling.wsd_factor,
            total_samples=total_samples,
            warmup_samples=warmup_samples,
            decay_samples=decay_samples,
            final=final,
            start=start,
            shape=shape,
        )
        super().__init__(optimizer, factor, samples_per_step=samples_per_step)


class SampleOneCycle(SampleSchedule):
    r"""Goes up to the peak and down again, with the momentum the other way round.

    The momentum is that of SGD (``momentum``) or the first of Adam's ``betas``, in every group.

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak.
        total_samples: Samples of the run.
        peak_at: Share of the run at which the peak is, in (0, 1).
        start: Factor of the first step, in [0, 1].
        final: Factor at the end and after it, in [0, 1]; of the peak, not of the start.
        cycle_momentum: Whether the momentum goes with it.
        low: Momentum at the peak, at most ``high``.
        high: Momentum at both ends.
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: A value out of range, or a group has no momentum to cycle.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_samples: int,
        peak_at: float = 0.3,
        start: float = 1 / 25,
        final: float = 1e-4,
        cycle_momentum: bool = True,
        low: float = 0.85,
        high: float = 0.95,
        samples_per_step: int | None = None,
    ) -> None:
        groups = optimizer.param_groups
        if cycle_momentum and not all("betas" in g or "momentum" in g for g in groups):
            raise ValueError(
                f"{type(optimizer).__name__} has a group without momentum or betas. Hint:"
                " cycle_momentum=False."
            )
        momentum = partial(
            scaling.one_cycle_momentum,
            total_samples=total_samples,
            peak_at=peak_at,
            low=low,
            high=high,
        )
        self._momentum = momentum if cycle_momentum else None
        factor = partial(
            scaling.one_cycle_factor,
            total_samples=total_samples,
            peak_at=peak_at,
            start=start,
            final=final,
        )
        super().__init__(optimizer, factor, samples_per_step=samples_per_step)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group; sets the momentum, as torch's ``OneCycleLR`` does."""
        lrs = super().get_lr()
        if self._momentum is not None:
            momentum = self._momentum(self.samples_seen)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum
        return lrs

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and the functions."""
        return {key: value for key, value in super().state_dict().items() if key != "_momentum"}
