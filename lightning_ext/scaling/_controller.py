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
    """Split a global batch over ranks and accumulation, with few passes and little lost.

    Accumulation is a multiple j·K₀ of ``min_accumulate``, so that W ranks that accumulate K₀ and
    one rank that accumulates W·K₀ make the same sizes at the same samples. j begins at
    ⌈⌊B / (W·K₀)⌋ / max_micro_batch⌉, the fewest passes that memory allows; up to a quarter more are
    taken where that loses fewer samples to rounding. The micro-batch is B // (W·K₀·j): what is
    made is at most B, and the caller compares and reports what was lost.

    Args:
        global_batch: B, samples per optimizer step.
        data_parallel_size: W, ranks that see different data.
        max_micro_batch: the largest micro-batch that fits.
        min_accumulate: K₀, the unit of accumulation.

    Returns:
        Micro-batch (at most ``max_micro_batch``) and accumulation (a multiple of K₀).

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
    unit = data_parallel_size * min_accumulate
    most = global_batch // unit  # more passes would leave some of them empty
    fewest = -(-most // max_micro_batch)
    choices = range(fewest, min(-(-5 * fewest // 4), most) + 1)
    passes = max(choices, key=lambda j: (global_batch // (unit * j) * j, -j))
    return BatchSplit(global_batch // (unit * passes), passes * min_accumulate)


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
