"""Consecutive parts of a row whose greatest sum is as small as can be.

Source: the linear partition problem, solved exactly by dynamic programming: once for the greatest
    sum, once for the squares of cuts that do not exceed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from lightning_ext.scaling._validate import require_count, require_non_negative


def balanced_split(costs: Sequence[float], parts: int) -> list[int]:
    """Cut a row into consecutive parts, none empty, of the smallest greatest sum.

        min over cuts of  max_k Σ_{i in part k} costs_i,  then of  Σ_k (Σ_{i in part k} costs_i)²

    Args:
        costs: Of each element, at least 0.
        parts: How many, at most as many as there are elements.

    Returns:
        Index of the first element of each part, beginning with 0.

    Raises:
        TypeError: if ``parts`` is not an integer.
        ValueError: if a cost is negative, or there are more parts than elements.

    Example:
        >>> balanced_split([9, 1, 1, 1, 1, 5], 3)
        [0, 1, 5]
    """
    require_count("parts", parts)
    for cost in costs:
        require_non_negative("costs", cost)
    if parts > len(costs):
        raise ValueError(f"parts={parts} is more than the {len(costs)} elements of costs")
    sums = [0.0, *accumulate(costs)]
    greatest, _ = _cut(sums, parts, lambda found, last: max(found, last))
    _, starts = _cut(sums, parts, lambda f, last: f + last**2 if last <= greatest else math.inf)
    return starts


def _cut(
    sums: list[float], parts: int, joined: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least score of cuts, ``joined`` part by part from 0 on, and where its parts start."""
    # best[i]: of the first i elements in so many parts, the score and the last cut.
    best = {i: (joined(0.0, sums[i]), 0) for i in range(1, len(sums))}
    cuts = [best]
    for part in range(2, parts + 1):
        best = {
            i: min((joined(best[c][0], sums[i] - sums[c]), c) for c in range(part - 1, i))
            for i in range(part, len(sums))
        }
        cuts.append(best)
    starts, end = [], len(sums) - 1
    for found in reversed(cuts):
        end = found[end][1]
        starts.append(end)
    return cuts[-1][len(sums) - 1][0], starts[::-1]
