"""The bubble of a pipeline, from the numbers of ranks, loops and micro-batches.

Source: Lamy-Poirier 2023 (arXiv:2211.05953); with one stage on a rank Huang et al. 2019 (GPipe,
    arXiv:1811.06965) and Narayanan et al. 2021 (arXiv:2104.04473).
"""

from __future__ import annotations

from lightning_ext.scaling._validate import require_count


def bubble_fraction(pipeline_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> float:
    """Return the part of a step in which a rank waits for others.

        idle/total = (P − 1)/(N_mb·N_loop + P − 1)

    It is that of :func:`pipeline_timeline` with stages of equal cost and sends that cost nothing,
    for all four schedules, as long as there are at least as many micro-batches as pipeline ranks.
    With fewer it is too small where a rank has several stages, for both schedules that have them: a
    micro-batch then has not come round when the rank is ready for its next stage.

    Args:
        pipeline_ranks: P, at least 1.
        num_microbatches: N_mb, micro-batches of a batch, at least 1.
        stages_per_rank: N_loop, at least 1.

    Returns:
        A number in [0, 1).

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if one is below 1.

    Example:
        >>> bubble_fraction(4, 12), bubble_fraction(4, 12, stages_per_rank=4)
        (0.2, 0.058823529411764705)
    """
    idle, ideal = _slots(pipeline_ranks, num_microbatches, stages_per_rank)
    return idle / (ideal + idle)


def bubble_overhead(pipeline_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> float:
    """Return how much longer a step takes than without waiting.

        idle/ideal = (P − 1)/(N_mb·N_loop)

    Where it holds, see :func:`bubble_fraction`.

    Args:
        pipeline_ranks: P, at least 1.
        num_microbatches: N_mb, micro-batches of a batch, at least 1.
        stages_per_rank: N_loop, at least 1.

    Returns:
        A number of at least 0.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if one is below 1.

    Example:
        >>> bubble_overhead(4, 12), bubble_overhead(4, 12, stages_per_rank=4)
        (0.25, 0.0625)
    """
    idle, ideal = _slots(pipeline_ranks, num_microbatches, stages_per_rank)
    return idle / ideal


def _slots(pipeline_ranks: int, num_microbatches: int, stages_per_rank: int) -> tuple[int, int]:
    require_count("pipeline_ranks", pipeline_ranks)
    require_count("num_microbatches", num_microbatches)
    require_count("stages_per_rank", stages_per_rank)
    return pipeline_ranks - 1, num_microbatches * stages_per_rank
