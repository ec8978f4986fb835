"""Times of calls that take turns, and how sure their ratios are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.geometry import timed

Call = Callable[[], Any]
Times = np.ndarray[Any, np.dtype[np.float64]]


def in_turn(
    calls: Mapping[str, Call], device: str, rounds: int, repeats: int = 1
) -> dict[str, Times]:
    """Time all calls in each round, each round from another one on.

    Backwards in every other round would be twice the same in a row, on what a cache still holds.

    Args:
        calls: by name.
        device: "cpu" or "cuda".
        rounds: how often.
        repeats: of a call in a row.

    Returns:
        Milliseconds of one call, one entry for each round.
    """
    for call in calls.values():
        timed(call, device, repeats)
    times: dict[str, Times] = {name: np.empty(rounds) for name in calls}
    names = [*calls]
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            times[name][k] = timed(calls[name], device, repeats)
    return times


def interval(ratios: Times) -> dict[str, float]:
    """Return the median of ratios and its 95 % bootstrap interval."""
    return interval_of_rounds(ratios[:, None])


def interval_of_rounds(ratios: Times) -> dict[str, float]:
    """Return the median of ratios (rounds, pairs) and its 95 % interval, by drawing rounds.

    Pairs of one round are of one process state, and resemble each other more than rounds do.
    """
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=(1, 2)), [0.025, 0.975])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}
