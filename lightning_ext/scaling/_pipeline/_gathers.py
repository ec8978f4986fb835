"""How often the stages of a rank are gathered and their gradients reduced in one batch.

Source: Lamy-Poirier 2023 (arXiv:2211.05953): breadth-first gathers once for each stage and pass;
    torch.distributed.pipelining 2.11 to 2.13, whose runtime keeps up to 3 stages gathered.
Differs: the counts of a depth-first order are derived from the order here.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ext.scaling._pipeline._orders import Work, depth_first_rounds, require_schedule

GATHER, REDUCE = "gather", "reduce"
TORCH_ACTIVE_STAGES = 3


def paper_gathers(
    schedule: str, *, pipeline_ranks: int, stages_per_rank: int = 1, num_microbatches: int
) -> int:
    """Return how often a rank gathers in a batch if it holds one gathered stage at a time.

        2 · stages_per_rank · groups

    A pass gathers a stage once for each run of micro-batches through it; forward and backward
    passes count apart. ``groups`` is 1 but under "interleaved_1f1b" with several stages on a rank,
    where num_microbatches/pipeline_ranks groups go through all of them in turn. A rank that keeps
    more than one stage gathers less often, see :class:`PipelineTimeline`.

    Args:
        schedule: "breadth_first", "gpipe", "1f1b" or "interleaved_1f1b".
        pipeline_ranks: P, at least 1.
        stages_per_rank: N_loop, at least 1.
        num_microbatches: micro-batches of a batch, at least 1.

    Returns:
        Gathers of one rank and batch.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if the schedule is unknown, or does not exist for these numbers.

    Example:
        >>> numbers = dict(pipeline_ranks=2, stages_per_rank=4, num_microbatches=8)
        >>> paper_gathers("breadth_first", **numbers), paper_gathers("interleaved_1f1b", **numbers)
        (8, 32)
    """
    require_schedule(schedule, pipeline_ranks, stages_per_rank, num_microbatches)
    is_repeated = schedule == "interleaved_1f1b" and stages_per_rank > 1
    groups = depth_first_rounds(pipeline_ranks, num_microbatches) if is_repeated else 1
    return 2 * stages_per_rank * groups


def torch_gathers(
    schedule: str, *, pipeline_ranks: int, stages_per_rank: int = 1, num_microbatches: int
) -> int:
    """Return how often rank 0 gathers in a batch by the rule of torch's runtime.

    With N = stages_per_rank, of which 3 stay gathered, and ``groups`` as in :func:`paper_gathers`:

        N                                 N ≤ 3
        2·(N − 3) + 3                     one group, forth and back
        2·(N − 3)·groups + 7              more groups on at least two ranks

    Args:
        schedule: "breadth_first", "gpipe", "1f1b" or "interleaved_1f1b".
        pipeline_ranks: P, at least 1.
        stages_per_rank: N, at least 1.
        num_microbatches: micro-batches of a batch, at least 1.

    Returns:
        Gathers of rank 0 and a batch; later ranks have up to 2 fewer.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if the schedule is unknown, or does not exist for these numbers.
    """
    require_schedule(schedule, pipeline_ranks, stages_per_rank, num_microbatches)
    missing = stages_per_rank - TORCH_ACTIVE_STAGES
    if missing <= 0:
        return stages_per_rank
    is_repeated = schedule == "interleaved_1f1b"
    groups = depth_first_rounds(pipeline_ranks, num_microbatches) if is_repeated else 1
    return 2 * missing * groups + (3 if groups == 1 else 7)


def with_gathers(order: Sequence[Work], max_active_stages: int) -> list[tuple[int, Work | str]]:
    """Put (stage, "gather") before the passes of an order, (stage, "reduce") behind; else work.

    Before each pass, stages that are not among the next ``max_active_stages`` different ones are
    let go, and those of them that are missing are gathered.
    """
    upcoming = _next_stages(order, max_active_stages)
    last = {work.stage: index for index, work in enumerate(order) if work.kind == "backward"}
    active: tuple[int, ...] = ()
    found: list[tuple[int, Work | str]] = []
    for index, work in enumerate(order):
        found += [(stage, GATHER) for stage in upcoming[index] if stage not in active]
        active = upcoming[index]
        found.append((work.stage, work))
        if last.get(work.stage) == index:
            found.append((work.stage, REDUCE))
    return found


def _next_stages(order: Sequence[Work], count: int) -> list[tuple[int, ...]]:
    """The first different stages from each position of an order on, nearest first."""
    found: list[tuple[int, ...]] = []
    following: tuple[int, ...] = ()
    for work in reversed(order):
        # Of the nearest count + 1 one is this stage itself, if at all.
        others = tuple(stage for stage in following if stage != work.stage)
        following = (work.stage, *others)
        found.append(following[:count])
    return found[::-1]
