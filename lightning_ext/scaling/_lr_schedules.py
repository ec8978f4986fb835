"""Learning-rate schedules as functions of samples: the factor of the peak, whatever the batch.

Source: Goyal et al. 2017, arXiv:1706.02677, section 2.2 (warm-up); Loshchilov & Hutter 2017,
    arXiv:1608.03983, equation 5 (cosine); Hägele et al. 2024, arXiv:2405.18392 (constant, then
    cooldown, linear or 1 − √x); Smith & Topin 2018, arXiv:1708.07120 (one cycle); Hoffer et al.
    2017, arXiv:1705.08741, section 5 (regime adaptation).
Differs: positions count samples instead of steps. One cycle has two legs that are cosines, as
    torch's has by default; the paper's legs are lines, with a third one at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_ext.scaling._validate import (
    require_count,
    require_fraction,
    require_non_negative,
    require_positive,
)

COOLDOWN_SHAPES = ("linear", "sqrt")


def warmup_factor(samples: float, *, warmup_samples: float, start: float = 0.0) -> float:
    """Return the factor of a linear ramp from ``start`` to 1, and 1 after it.

    Args:
        samples: samples seen, at least 0.
        warmup_samples: length of the ramp, at least 0.
        start: factor at 0 samples, in [0, 1]. Goyal et al. begin at the reference learning rate:
            1/κ of the peak.

    Returns:
        ``start + (1 − start)·samples / warmup_samples``, at most 1.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> warmup_factor(25, warmup_samples=100)
        0.25
    """
    require_non_negative("samples", samples)
    require_non_negative("warmup_samples", warmup_samples)
    require_fraction("start", start)
    return start + (1 - start) * _done(samples, 0, warmup_samples)


def cosine_factor(
    samples: float,
    *,
    total_samples: float,
    warmup_samples: float = 0,
    final: float = 0.0,
    start: float = 0.0,
) -> float:
    """Return the factor of a warm-up and half a cosine from 1 to ``final``.

    Args:
        samples: samples seen, at least 0.
        total_samples: samples of the run, the warm-up included, above 0.
        warmup_samples: length of the warm-up, at most ``total_samples``.
        final: factor at the end of the run and after it, in [0, 1].
        start: factor at 0 samples if there is a warm-up, in [0, 1].

    Returns:
        ``final + (1 − final)·(1 + cos πx) / 2``, with x from 0 at the warm-up's end to 1.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range, or the warm-up is longer than the run.

    Example:
        >>> round(cosine_factor(50, total_samples=100, final=0.1), 12)
        0.55
    """
    _check_run(total_samples, warmup_samples)
    rising = warmup_factor(samples, warmup_samples=warmup_samples, start=start)
    require_fraction("final", final)
    if samples < warmup_samples:
        return rising
    return _cosine(1.0, final, _done(samples, warmup_samples, total_samples))


def linear_factor(
    samples: float,
    *,
    total_samples: float,
    warmup_samples: float = 0,
    final: float = 0.0,
    start: float = 0.0,
) -> float:
    """Return the factor of a warm-up and a straight line from 1 to ``final``.

    Args:
        samples: samples seen, at least 0.
        total_samples: samples of the run, the warm-up included, above 0.
        warmup_samples: length of the warm-up, at most ``total_samples``.
        final: factor at the end of the run and after it, in [0, 1].
        start: factor at 0 samples if there is a warm-up, in [0, 1].

    Returns:
        ``1 − (1 − final)·x``, with x from 0 at the warm-up's end to 1.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range, or the warm-up is longer than the run.

    Example:
        >>> linear_factor(60, total_samples=100, warmup_samples=20)
        0.5
    """
    _check_run(total_samples, warmup_samples)
    rising = warmup_factor(samples, warmup_samples=warmup_samples, start=start)
    require_fraction("final", final)
    if samples < warmup_samples:
        return rising
    return 1 - (1 - final) * _done(samples, warmup_samples, total_samples)


def wsd_factor(
    samples: float,
    *,
    total_samples: float,
    warmup_samples: float,
    decay_samples: float,
    final: float = 0.0,
    start: float = 0.0,
    shape: str = "linear",
) -> float:
    """Return the factor of warm-up, constant and cooldown (warmup–stable–decay).

    Args:
        samples: samples seen, at least 0.
        total_samples: samples of the run, above 0.
        warmup_samples: length of the warm-up.
        decay_samples: length of the cooldown; both together at most ``total_samples``.
        final: factor at the end of the run and after it, in [0, 1].
        start: factor at 0 samples if there is a warm-up, in [0, 1].
        shape: of the cooldown, ``"linear"`` (1 − x) or ``"sqrt"`` (1 − √x).

    Returns:
        ``final + (1 − final)·shape(x)``, with x from 0 at the cooldown's begin to 1.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range, or the phases are longer than the run.

    Example:
        >>> wsd_factor(85, total_samples=100, warmup_samples=10, decay_samples=20, shape="sqrt")
        0.5
    """
    require_non_negative("decay_samples", decay_samples)
    _check_run(total_samples, warmup_samples, decay_samples)
    require_fraction("final", final)
    if shape not in COOLDOWN_SHAPES:
        raise ValueError(f"shape={shape!r} is not known; choose one of {COOLDOWN_SHAPES}")
    rising = warmup_factor(samples, warmup_samples=warmup_samples, start=start)
    begin = total_samples - decay_samples
    if samples < begin:
        return rising
    done = _done(samples, begin, total_samples)
    return 1 - (1 - final) * (math.sqrt(done) if shape == "sqrt" else done)


def one_cycle_factor(
    samples: float,
    *,
    total_samples: float,
    peak_at: float = 0.3,
    start: float = 1 / 25,
    final: float = 1e-4,
) -> float:
    """Return the factor of one cycle: half a cosine up to 1, and another down to ``final``.

    Args:
        samples: samples seen, at least 0.
        total_samples: samples of the run, above 0.
        peak_at: share of the run at which the factor is 1, in (0, 1).
        start: factor at 0 samples, in [0, 1].
        final: factor at the end of the run and after it, in [0, 1]; of the peak, not of the start.

    Returns:
        A number between the smaller of ``start`` and ``final``, and 1.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> one_cycle_factor(30, total_samples=100)
        1.0
    """
    require_fraction("start", start)
    require_fraction("final", final)
    return _cycle(samples, total_samples, peak_at, (start, 1.0, final))


def one_cycle_momentum(
    samples: float,
    *,
    total_samples: float,
    peak_at: float = 0.3,
    low: float = 0.85,
    high: float = 0.95,
) -> float:
    """Return the momentum that goes with one cycle: lowest where the learning rate is highest.

    Args:
        samples: samples seen, at least 0.
        total_samples: samples of the run, above 0.
        peak_at: share of the run at which the momentum is ``low``, in (0, 1).
        low: smallest momentum, in [0, 1], at most ``high``.
        high: momentum at both ends, in [0, 1].

    Returns:
        SGD's momentum, or Adam's first beta.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range, or ``low`` is above ``high``.

    Example:
        >>> one_cycle_momentum(30, total_samples=100)
        0.85
    """
    require_fraction("low", low)
    require_fraction("high", high)
    if low > high:
        raise ValueError(f"low={low} is above high={high}; the momentum falls as the rate rises")
    return _cycle(samples, total_samples, peak_at, (high, low, high))


def regime_adaptation(
    lengths: Sequence[int], *, global_batch: int, reference_batch: int
) -> tuple[int, ...]:
    """Return lengths that keep the number of updates: all times ⌈global_batch / reference_batch⌉.

    Args:
        lengths: epochs, milestones or samples that belong to the reference batch, each at least 1.
        global_batch: samples per optimizer step.
        reference_batch: samples per optimizer step that the lengths belong to.

    Returns:
        The stretched lengths.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if it is below 1.

    Example:
        >>> regime_adaptation([30, 60, 90], global_batch=1024, reference_batch=256)
        (120, 240, 360)
    """
    require_count("global_batch", global_batch)
    require_count("reference_batch", reference_batch)
    for length in lengths:
        require_count("length", length)
    ratio = -(-global_batch // reference_batch)
    return tuple(length * ratio for length in lengths)


def _check_run(total: float, warmup: float, decay: float = 0) -> None:
    """Refuse a run that is shorter than its phases."""
    require_positive("total_samples", total)
    require_non_negative("warmup_samples", warmup)
    if warmup + decay > total:
        cooldown = f" and decay_samples={decay}" if decay else ""
        raise ValueError(
            f"warmup_samples={warmup}{cooldown} do not fit in total_samples={total}; all of them "
            "count samples (not steps), and total_samples includes the others"
        )


def _done(samples: float, begin: float, end: float) -> float:
    """Return which part of [begin, end] is over, in [0, 1]."""
    return 1.0 if samples >= end else max(0.0, (samples - begin) / (end - begin))


def _cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


def _cycle(
    samples: float, total: float, peak_at: float, values: tuple[float, float, float]
) -> float:
    require_non_negative("samples", samples)
    require_positive("total_samples", total)
    require_fraction("peak_at", peak_at)
    if peak_at in (0, 1):
        raise ValueError(f"peak_at={peak_at} is not allowed; both legs have a length, as with 0.3")
    first, middle, last = values
    peak = peak_at * total
    if samples < peak:
        return _cosine(first, middle, _done(samples, 0, peak))
    return _cosine(middle, last, _done(samples, peak, total))
