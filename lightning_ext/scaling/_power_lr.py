"""The Power scheduler's learning rate, from tokens seen and the batch.

Source: Shen et al. 2024, arXiv:2408.13359, equations 7 and 8; a = 4, b = −0.51 and η_max = 0.02 are
    the values of section 4.
Differs: the final decay is a line or 1 − √x; the paper's runs decay exponentially.
"""

from __future__ import annotations

from lightning_ext.scaling._lr_schedules import warmup_factor, wsd_factor
from lightning_ext.scaling._validate import require_non_negative, require_number, require_positive


def power_lr(
    tokens: float,
    *,
    global_batch: float,
    a: float = 4.0,
    b: float = -0.51,
    lr_max: float = 0.02,
    warmup_tokens: float = 0,
    total_tokens: float | None = None,
    decay_tokens: float = 0,
    final: float = 0.0,
    shape: str = "linear",
) -> float:
    """Return the learning rate ``min(lr_max, β·a·n^b)``, with a warm-up before and a decay after.

    The constants belong to a batch β in sequences (of 4096 tokens in the paper), not in tokens,
    and to μP, which divides the rate of inner matrices by the width.

    Args:
        tokens: n, tokens seen, at least 0.
        global_batch: β, sequences per optimizer step.
        a: amplitude, above 0.
        b: exponent, at most 0.
        lr_max: largest learning rate.
        warmup_tokens: length of a linear ramp up to the value that the law has at its end.
        total_tokens: tokens of the run; needed by the decay only.
        decay_tokens: length of the decay, from the value that the law has at its begin.
        final: what the decay ends at, as a factor of that value, in [0, 1].
        shape: of the decay, ``"linear"`` or ``"sqrt"``.

    Returns:
        The learning rate itself, not a factor.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range, a decay has no end, or the phases exceed the run.

    Example:
        >>> round(power_lr(10e12, global_batch=1024, a=4.6), 4)
        0.0011
    """
    _check_law(tokens, global_batch, a, b, lr_max)
    if total_tokens is None:
        if decay_tokens:
            raise ValueError(f"decay_tokens={decay_tokens} needs total_tokens, where it ends")
        factor = warmup_factor(tokens, warmup_samples=warmup_tokens)
        held = max(tokens, warmup_tokens)
    else:
        if warmup_tokens + decay_tokens > total_tokens:
            raise ValueError(
                f"warmup_tokens={warmup_tokens} and decay_tokens={decay_tokens} do not fit in "
                f"total_tokens={total_tokens}, which includes both"
            )
        factor = wsd_factor(
            tokens,
            total_samples=total_tokens,
            warmup_samples=warmup_tokens,
            decay_samples=decay_tokens,
            final=final,
            shape=shape,
        )
        held = min(max(tokens, warmup_tokens), total_tokens - decay_tokens)
    if held == 0 and b < 0:
        return factor * lr_max
    return factor * min(lr_max, global_batch * a * held**b)


def _check_law(tokens: float, global_batch: float, a: float, b: float, lr_max: float) -> None:
    require_non_negative("tokens", tokens)
    for name, value in {"global_batch": global_batch, "a": a, "lr_max": lr_max}.items():
        require_positive(name, value)
    require_number("b", b)
    if not b <= 0:
        raise ValueError(f"b={b} is not allowed; the rate falls with tokens, as with -0.51")
