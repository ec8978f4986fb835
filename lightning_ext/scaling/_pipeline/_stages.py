"""Seconds and stashed layers of a pipeline whose stages may have different numbers of layers.

Source: derived. A batch takes as long as its longest chain of passes and sends; breadth-first has
    few enough kinds of chains to go through them stage by stage, the orders of others are replayed.
Differs: a replay is bounded in size; beyond it a formula stands in, see :func:`batch_seconds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from lightning_ext.scaling._pipeline._orders import Work, rank_order
from lightning_ext.scaling._pipeline._seconds import Shape

_MOST_PASSES = 2048
_GROUPS_TO_PEAK = 3


class _Step(NamedTuple):
    """A pass, behind the one before it on its rank and the one that its input comes from."""

    stage: int
    is_backward: bool
    before: int
    source: int
    is_sent: bool


@lru_cache(maxsize=1024)
def stage_layers(layers: int, shape: Shape) -> tuple[int, ...]:
    """Return the layers of each stage; where they differ by one, the last stages have more."""
    stages = shape.pipeline_ranks * shape.stages_per_rank
    least, more = divmod(layers, stages)
    return (least,) * (stages - more) + (least + 1,) * more


@lru_cache(maxsize=1024)
def fullest_ranks(sizes: tuple[int, ...], pipeline_ranks: int) -> tuple[int, ...]:
    """Return rank 0, which stashes most passes, and the first rank that has most layers."""
    first_large = sizes.index(sizes[-1])
    return (0,) if first_large == 0 else (0, first_large % pipeline_ranks)


def batch_seconds(
    shape: Shape, sizes: tuple[int, ...], forward_s: float, backward_s: float, send_s: float
) -> float:
    """Return the time of a batch, passes given for one layer.

    Equal to the timeline for "breadth_first" and "gpipe"; for "1f1b" with equal stages; for
    "interleaved_1f1b" with equal stages and sends no longer than a pass; and for all in any case
    up to 2,048 passes of all ranks. Beyond, passes of "interleaved_1f1b" are taken to be at least
    as long as a send, which bounds the time from above by up to twice; and stages that differ wait
    for sends as equal ones do, where timelines of up to 6 ranks are missed by −11 % to +24 % with
    stages of one and two layers, by −4 % to +11 % with stages of four and five.
    """
    _, ranks, loops, count = shape
    forward = tuple(n * forward_s for n in sizes)
    backward = tuple(n * backward_s for n in sizes)
    is_looped = shape.schedule not in ("breadth_first", "gpipe", "1f1b")
    is_slow = is_looped and send_s > min(forward[0], backward[0])
    if ranks == 1 or (sizes[0] == sizes[-1] and not is_slow):
        return shape.seconds(forward[-1], backward[-1], send_s)
    if shape.is_breadth_first:
        return sum(_longest(c, ranks, count, send_s) for c in (forward, backward[::-1]))
    if 2 * count * ranks * loops <= _MOST_PASSES:
        return _replayed(shape, forward, backward, send_s)
    if is_slow:
        forward, backward = (tuple(max(c, send_s) for c in each) for each in (forward, backward))
    moved = sum(_longest(c, ranks, count, 0.0) for c in (forward, backward[::-1]))
    large = forward[-1], backward[-1]
    return moved + shape.seconds(*large, send_s) - shape.seconds(*large, 0.0)


@lru_cache(maxsize=1024)
def stashed_layers(shape: Shape, rank: int, sizes: tuple[int, ...]) -> int:
    """Return the most layers of a rank that keep a micro-batch; with sizes of 1, its passes."""
    _, ranks, loops, count = shape
    own = sum(sizes[rank::ranks])
    if shape.is_breadth_first:
        return count * own
    if sizes[0] == sizes[-1] and rank == 0:
        return shape.stashed * sizes[0]
    # What is kept repeats with each group of micro-batches.
    count = min(count, _GROUPS_TO_PEAK * count // shape.groups)
    kept = most = 0
    for work in rank_order(shape.schedule, rank, ranks, loops, count):
        kept += sizes[work.stage] * (1 if work.kind == "forward" else -1)
        most = max(most, kept)
    return most


def _longest(costs: Sequence[float], ranks: int, count: int, send_s: float) -> float:
    """The longest chain through all stages, each done with all micro-batches before the next.

    A chain goes on to the next stage, or through all micro-batches of a stage and then to the next
    of the same rank; ``entered`` and ``through`` are the longest to either end of a stage.
    """
    entered: list[float] = []
    through: list[float] = []
    for stage, cost in enumerate(costs):
        arrived = entered[-1] + send_s if stage else 0.0
        if stage >= ranks:
            arrived = max(arrived, through[stage - ranks])
        beside = through[-1] + send_s if stage else 0.0
        entered.append(arrived + cost)
        through.append(cost + max(arrived + (count - 1) * cost, beside))
    return through[-1]


def _replayed(
    shape: Shape, forward: Sequence[float], backward: Sequence[float], send_s: float
) -> float:
    ended = [0.0]  # of no pass, then of each
    for stage, is_backward, before, source, is_sent in _steps(shape):
        start = max(ended[before], ended[source] + send_s if is_sent else ended[source])
        ended.append(start + (backward if is_backward else forward)[stage])
    return max(ended)


@lru_cache(maxsize=1024)
def _steps(shape: Shape) -> tuple[_Step, ...]:
    """The passes of all ranks in an order in which each can be computed."""
    schedule, ranks, loops, count = shape
    todo = [iter(rank_order(schedule, rank, ranks, loops, count)) for rank in range(ranks)]
    heads = [next(each, None) for each in todo]
    places: dict[Work | None, int] = {None: 0}
    latest = [0] * ranks
    found: list[_Step] = []
    while any(heads):
        for rank, head in enumerate(heads):
            while head is not None and (source := _source(head, ranks * loops)) in places:
                is_sent = source is not None and source.stage != head.stage
                is_backward = head.kind == "backward"
                found.append(_Step(head.stage, is_backward, latest[rank], places[source], is_sent))
                places[head] = latest[rank] = len(found)
                head = next(todo[rank], None)
            heads[rank] = head
    return tuple(found)


def _source(work: Work, stages: int) -> Work | None:
    """The pass that the input comes from."""
    stage, kind, micro_batch = work
    if kind == "forward":
        return Work(stage - 1, kind, micro_batch) if stage else None
    if stage == stages - 1:
        return Work(stage, "forward", micro_batch)
    return Work(stage + 1, kind, micro_batch)
