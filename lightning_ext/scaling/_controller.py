"""From a proposed batch to the next one, and from a global batch to its parts."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_ext.scaling._validate import require_count, require_number


class BatchSplit(NamedTuple):
    """Samples per forward pass on a rank, and forward passes per optimizer step."""

    micro_batch: int
    accumulate: int


def next_global_batch(
    current: int,
    target: float,
    *,
    max_global_batch: int,
    growth: float = 2.0,
    threshold: float = 0.2,
    monotone: bool = True,
) -> int:
    """Return the global batch to use next, one damped move from ``current`` towards ``target``.

    Args:
        current: present global batch; at least 1.
        target: proposed global batch; infinity goes as far as allowed, nan stays.
        max_global_batch: upper limit; at least ``current``.
        growth: largest factor of one change, up or down; above 1, infinity for no limit.
        threshold: stay where ``|target/current − 1|`` is below it; at least 0.
        monotone: never shrink.

    Returns:
        The next global batch, rounded so that neither limit is passed; at least 1.

    Raises:
        TypeError: if a value is not a number or a batch not an integer.
        ValueError: if a value is out of range.

    Example:
        >>> next_global_batch(64, 1000.0, max_global_batch=4096)
        128
    """
    _check_limits(current, target, max_global_batch, growth, threshold)
    if math.isnan(target) or abs(target / current - 1) < threshold:
        return current
    most = min(current * growth, max_global_batch)
    least = current if monotone else math.ceil(current / growth)
    return max(least, math.floor(min(target, most))) if target > least else max(least, 1)


def split_global_batch(
    global_batch: int, *, data_parallel_size: int, max_micro_batch: int, min_accumulate: int = 1
) -> BatchSplit:
    """Split a global batch over ranks and accumulation, with as few passes as memory allows.

    With W ranks and K₀ = ``min_accumulate``, the micro-batch is B // (W·K₀) where that fits,
    otherwise B // (W·K) with K = ⌈B / (W·max_micro_batch)⌉. Rounding is downwards, so
    micro_batch·accumulate·W ≤ B; the caller compares and reports what was lost.

    Args:
        global_batch: B, samples per optimizer step.
        data_parallel_size: W, ranks that see different data.
        max_micro_batch: the largest micro-batch that fits.
        min_accumulate: K₀, the least number of micro-batches per step.

    Returns:
        Micro-batch (at most ``max_micro_batch``) and accumulation (at least ``min_accumulate``).

    Raises:
        TypeError: if a value is not an integer.
        ValueError: if a value is below 1, or B < W·K₀.

    Example:
        >>> split_global_batch(512, data_parallel_size=4, max_micro_batch=32)
        BatchSplit(micro_batch=32, accumulate=4)
    """
    for name, value in (
        ("global_batch", global_batch),
        ("data_parallel_size", data_parallel_size),
        ("max_micro_batch", max_micro_batch),
        ("min_accumulate", min_accumulate),
    ):
        require_count(name, value)
    if global_batch < data_parallel_size * min_accumulate:
        raise ValueError(
            f"global_batch={global_batch} cannot be split over {data_parallel_size} ranks × "
            f"{min_accumulate} micro-batches; it must be at least "
            f"{data_parallel_size * min_accumulate}"
        )
    accumulate = min_accumulate
    if global_batch // (data_parallel_size * accumulate) > max_micro_batch:
        needed = -(-global_batch // (data_parallel_size * max_micro_batch))
        # With micro-batches of one sample, rounding up would leave some of them empty.
        accumulate = min(needed, global_batch // data_parallel_size)
    return BatchSplit(global_batch // (data_parallel_size * accumulate), accumulate)


def _check_limits(
    current: int, target: float, max_global_batch: int, growth: float, threshold: float
) -> None:
    require_count("current", current)
    require_count("max_global_batch", max_global_batch)
    for name, value in (("target", target), ("growth", growth), ("threshold", threshold)):
        require_number(name, value)
    if not growth > 1:
        raise ValueError(f"growth={growth!r} is not allowed; it must be above 1")
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold!r} is not allowed; it must be at least 0")
    if max_global_batch < current:
        raise ValueError(
            f"max_global_batch={max_global_batch} is below the current batch {current}; raise it "
            "or start smaller"
        )
