"""What each rank of a pipeline computes, in which order, under the schedules that torch has.

Source: Lamy-Poirier 2023 (arXiv:2211.05953), breadth-first; Huang et al. 2019 (GPipe,
    arXiv:1811.06965); Narayanan et al. 2021 (arXiv:2104.04473), 1F1B and its interleaved,
    depth-first form. The orders are those of torch.distributed.pipelining 2.11 to 2.13.
Differs: idle slots are left out; they follow from the times.
"""

from __future__ import annotations

from typing import NamedTuple

from lightning_ext.scaling._validate import require_count

PIPELINE_SCHEDULES = ("breadth_first", "gpipe", "1f1b", "interleaved_1f1b")
_ONE_STAGE = frozenset({"gpipe", "1f1b"})


class Work(NamedTuple):
    """A pass of one stage over one micro-batch."""

    stage: int
    kind: str
    micro_batch: int


def rank_order(
    schedule: str, rank: int, pipeline_ranks: int, stages_per_rank: int, num_microbatches: int
) -> list[Work]:
    """Return what a rank computes in one batch; its stages are rank, rank + P, rank + 2P, …."""
    if schedule == "1f1b":
        return _one_f_one_b(rank, pipeline_ranks, num_microbatches)
    if schedule == "interleaved_1f1b":
        return _depth_first(rank, pipeline_ranks, stages_per_rank, num_microbatches)
    stages = range(rank, pipeline_ranks * stages_per_rank, pipeline_ranks)
    batch = range(num_microbatches)
    # torch's breadth-first goes back through the micro-batches, its GPipe through them as before.
    back = batch if schedule == "gpipe" else batch[::-1]
    forward = [Work(stage, "forward", m) for stage in stages for m in batch]
    return forward + [Work(stage, "backward", m) for stage in stages[::-1] for m in back]


def require_schedule(
    schedule: str, pipeline_ranks: int, stages_per_rank: int, num_microbatches: int
) -> None:
    """Raise unless torch has the schedule for these numbers."""
    require_count("pipeline_ranks", pipeline_ranks)
    require_count("stages_per_rank", stages_per_rank)
    require_count("num_microbatches", num_microbatches)
    if schedule not in PIPELINE_SCHEDULES:
        raise ValueError(
            f"schedule={schedule!r} is unknown; it must be one of {', '.join(PIPELINE_SCHEDULES)}"
        )
    if schedule in _ONE_STAGE and stages_per_rank > 1:
        raise ValueError(
            f"stages_per_rank={stages_per_rank} does not go with {schedule}, which has one stage "
            "on a rank; use breadth_first or interleaved_1f1b"
        )
    if schedule == "1f1b" and num_microbatches < pipeline_ranks:
        raise ValueError(
            f"num_microbatches={num_microbatches} is below pipeline_ranks={pipeline_ranks}; 1f1b "
            "needs as many, breadth_first and gpipe do not"
        )
    rounds = depth_first_rounds(pipeline_ranks, num_microbatches)
    if schedule == "interleaved_1f1b" and num_microbatches % rounds:
        raise ValueError(
            f"num_microbatches={num_microbatches} does not divide into {rounds} rounds of at least "
            f"{pipeline_ranks}; interleaved_1f1b needs a multiple of the pipeline ranks, or fewer"
        )


def depth_first_rounds(pipeline_ranks: int, num_microbatches: int) -> int:
    """Return in how many groups of about P the micro-batches go through the stages of a rank."""
    return max(1, num_microbatches // pipeline_ranks)


def _one_f_one_b(rank: int, pipeline_ranks: int, num_microbatches: int) -> list[Work]:
    """One forward pass for each stage that follows, then forward and backward in turn."""
    ahead = pipeline_ranks - 1 - rank
    forward = [Work(rank, "forward", m) for m in range(num_microbatches)]
    backward = [Work(rank, "backward", m) for m in range(num_microbatches)]
    turns = zip(forward[ahead:], backward, strict=False)
    steady = [work for turn in turns for work in turn]
    return forward[:ahead] + steady + backward[num_microbatches - ahead :]


def _depth_first(
    rank: int, pipeline_ranks: int, stages_per_rank: int, num_microbatches: int
) -> list[Work]:
    """Groups of micro-batches go through all stages of the rank; passes ahead, then in turn."""
    group = num_microbatches // depth_first_rounds(pipeline_ranks, num_microbatches)
    passes = stages_per_rank * num_microbatches
    ahead = min((stages_per_rank - 1) * group + 2 * (pipeline_ranks - 1 - rank), passes)

    def work(kind: str, index: int) -> Work:
        turn, within = divmod(index, group)
        loop = turn % stages_per_rank
        local = loop if kind == "forward" else stages_per_rank - 1 - loop
        micro_batch = turn // stages_per_rank * group + within
        return Work(local * pipeline_ranks + rank, kind, micro_batch)

    order = [work("forward", index) for index in range(ahead)]
    for index in range(passes - ahead):
        order += [work("forward", ahead + index), work("backward", index)]
    return order + [work("backward", index) for index in range(passes - ahead, passes)]
