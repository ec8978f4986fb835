"""Decay of an exponential moving average, restated when the batch changes.

Source: Busbridge et al. 2023 (arXiv:2307.13813, definition 1.2), ρ → ρ^κ; the half-life form is
    the same rule with the batch written out.
"""

from __future__ import annotations

import math

from lightning_ext.scaling._validate import (
    require_fraction,
    require_non_negative,
    require_number,
    require_positive,
)


def ema_decay(decay: float, kappa: float) -> float:
    """Return ρ^κ, the decay per step at a batch κ times the reference batch.

    Args:
        decay: ρ per step at the reference batch, in [0, 1].
        kappa: ``global_batch / reference_batch``, or its sum over the steps since the last
            update; finite and above 0.

    Returns:
        The decay to use for this update, in [0, 1].

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> ema_decay(0.5, 3)
        0.125
    """
    require_fraction("decay", decay)
    require_positive("kappa", kappa)
    return decay if kappa == 1 else float(decay**kappa)


def half_life_to_decay(half_life_samples: float, global_batch: float) -> float:
    """Return 2^(−B/h), the decay per step that halves an old weight every h samples.

    Args:
        half_life_samples: h, in samples; above 0, ``math.inf`` for an average that never moves.
        global_batch: B, samples per optimizer step; finite and above 0.

    Returns:
        The decay per step, in [0, 1].

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> half_life_to_decay(half_life_samples=1024, global_batch=1024)
        0.5
    """
    require_number("half_life_samples", half_life_samples)
    require_positive("global_batch", global_batch)
    if not half_life_samples > 0:
        raise ValueError(
            f"half_life_samples={half_life_samples!r} is not allowed; it must be above 0"
        )
    return float(2.0 ** (-global_batch / half_life_samples))


def decay_to_half_life(decay: float, global_batch: float) -> float:
    """Return −B/log₂ρ, the samples after which an old weight counts half.

    Args:
        decay: ρ per step, in [0, 1].
        global_batch: B, samples per optimizer step; finite and above 0.

    Returns:
        The half-life in samples: 0 for ρ = 0, infinite for ρ = 1.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> decay_to_half_life(0.5, global_batch=512)
        512.0
    """
    require_fraction("decay", decay)
    require_positive("global_batch", global_batch)
    if decay == 0:
        return 0.0
    return math.inf if decay == 1 else -global_batch / math.log2(decay)


def ema_warmup(decay: float, reference_steps: float) -> float:
    """Return min(ρ, (1 + t)/(10 + t)), which lets a young average follow the weights.

    Args:
        decay: ρ per step at the reference batch, in [0, 1].
        reference_steps: t, samples seen divided by the reference batch; finite, at least 0.

    Returns:
        The decay per step at the reference batch; scale it with ``ema_decay`` afterwards.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> ema_warmup(0.999, reference_steps=0)
        0.1
    """
    require_fraction("decay", decay)
    require_non_negative("reference_steps", reference_steps)
    return min(decay, (1 + reference_steps) / (10 + reference_steps))
