"""Reads schedulers without stepping them: how long they warm up, and how long they last."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.optim import lr_scheduler as torch_schedulers

from lightning_ext.optim import SampleSchedule

_GRID = 256
_FARTHEST_SAMPLES, _FARTHEST_CALLS = 1e12, 1e6  # where a run has no end
_NEAR_PEAK = 1 - 1e-3  # of it, so that a ramp's last rounding is no longer warm-up
_FALLING = (
    torch_schedulers.StepLR,
    torch_schedulers.MultiStepLR,
    torch_schedulers.ExponentialLR,
    torch_schedulers.PolynomialLR,
    torch_schedulers.CosineAnnealingLR,
    torch_schedulers.CosineAnnealingWarmRestarts,
    torch_schedulers.ReduceLROnPlateau,
)


def warmup_samples(scheduler: Any, *, per_call: float, total_samples: float) -> float | None:
    """Samples until the learning rate is at its peak.

    Args:
        scheduler: A scheduler of torch or of :mod:`lightning_ext.optim`.
        per_call: Samples between two calls of its ``step``.
        total_samples: Samples of the run, the range in which functions are probed.

    Returns:
        Their number, 0 without a warm-up, ``None`` where the class is not known.
    """
    if isinstance(scheduler, SampleSchedule):
        return _first_peak(scheduler.fn, total_samples, whole=False)
    calls = _warmup_calls(scheduler, per_call, total_samples)
    return None if calls is None else calls * per_call


def length_calls(scheduler: Any) -> float | None:
    """Calls of ``step`` that a scheduler is laid out for; ``None`` where it has no end."""
    if isinstance(scheduler, torch_schedulers.OneCycleLR):
        return scheduler.total_steps
    if isinstance(scheduler, torch_schedulers.CosineAnnealingLR):
        return scheduler.T_max
    if isinstance(scheduler, torch_schedulers.PolynomialLR):
        return scheduler.total_iters
    if isinstance(scheduler, torch_schedulers.LinearLR):
        falls = scheduler.end_factor < scheduler.start_factor
        return scheduler.total_iters if falls else None
    if isinstance(scheduler, torch_schedulers.SequentialLR):
        last = length_calls(scheduler._schedulers[-1])
        return None if last is None else scheduler._milestones[-1] + last
    nested = [length_calls(s) for s in getattr(scheduler, "_schedulers", ())]
    return max((n for n in nested if n is not None), default=None)


def _warmup_calls(scheduler: Any, per_call: float, total_samples: float) -> float | None:
    if isinstance(scheduler, torch_schedulers.LambdaLR):
        peaks = [_first_peak(f, total_samples / per_call, whole=True) for f in scheduler.lr_lambdas]
        return max(peaks)
    if isinstance(scheduler, torch_schedulers.LinearLR):
        return scheduler.total_iters if scheduler.start_factor < scheduler.end_factor else 0
    if isinstance(scheduler, torch_schedulers.ConstantLR):
        return scheduler.total_iters if scheduler.factor < 1 else 0
    if isinstance(scheduler, torch_schedulers.OneCycleLR):
        return scheduler._schedule_phases[0]["end_step"] + 1
    if isinstance(scheduler, torch_schedulers.CyclicLR):
        return scheduler.total_size * scheduler.step_ratio
    if isinstance(scheduler, (torch_schedulers.SequentialLR, torch_schedulers.ChainedScheduler)):
        return _composite_calls(scheduler, per_call, total_samples)
    return 0 if isinstance(scheduler, _FALLING) else None


def _composite_calls(scheduler: Any, per_call: float, total_samples: float) -> float | None:
    parts = scheduler._schedulers
    if isinstance(scheduler, torch_schedulers.SequentialLR):
        parts = parts[:1]
    found = [warmup_samples(part, per_call=per_call, total_samples=total_samples) for part in parts]
    known = [samples / per_call for samples in found if samples is not None]
    return max(known) if len(known) == len(found) or any(known) else None


def _first_peak(fn: Callable[[Any], Any], end: float, *, whole: bool) -> float:
    """Where a function of a position first comes close to its largest value in a run."""
    factors: dict[float, float] = {}
    for at in _positions(end, whole=whole):
        with suppress(LookupError, ArithmeticError, ValueError):  # a table that ends before
            factors[at] = float(fn(at))
    enough = max(factors.values(), default=0.0) * _NEAR_PEAK
    return next((at for at, factor in factors.items() if factor >= enough), 0)


def _positions(end: float, *, whole: bool) -> list[float]:
    """A grid that is fine at the beginning, and even over the rest."""
    end = min(end, _FARTHEST_CALLS if whole else _FARTHEST_SAMPLES)
    even = [end * i / _GRID for i in range(_GRID + 1)]
    fine = [1.1**i for i in range(int(math.log(max(end, 1)) / math.log(1.1)) + 1)]
    every = {0.0, *even, *fine}
    return sorted({int(at) for at in every} if whole else every)
