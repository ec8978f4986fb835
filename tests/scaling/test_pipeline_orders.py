"""Orders of work, gathers and reductions of pipelines, against the schedules of torch itself."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import _add_reduce_grad, _add_unshard_reshard

from lightning_ext.scaling import PIPELINE_SCHEDULES, paper_gathers, pipeline_timeline
from lightning_ext.scaling._pipeline._gathers import with_gathers
from lightning_ext.scaling._pipeline._orders import Work, rank_order, require_schedule

TORCH: dict[str, Any] = {
    "breadth_first": ScheduleLoopedBFS,
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
}
KINDS = {"F": "forward", "B": "backward", "UNSHARD": "gather", "REDUCE_GRAD": "reduce"}
LOOPED = ("breadth_first", "interleaved_1f1b")
SINGLE = ("gpipe", "1f1b")
GRID = list(product((1, 2, 3, 4), (1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 6, 8, 12)))


class Stage:
    """As much of a stage as the schedules ask for; it notes what it is told to compute."""

    def __init__(self, index: int, pipeline_ranks: int, num_stages: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_size, self.group_rank = pipeline_ranks, index % pipeline_ranks
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.seen: list[Work] = []

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.seen.append(Work(self.stage_index, "forward", micro_batch))

    def backward_one_chunk(self, micro_batch: int, **_: Any) -> None:
        self.seen.append(Work(self.stage_index, "backward", micro_batch))

    def perform_reduce_grad(self, *_: Any) -> None:
        pass

    def _no_messages(self, *_: Any) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _no_messages


def run_single(schedule: str, rank: int, ranks: int, count: int) -> list[Work]:
    """Let torch run a schedule of one stage a rank on a stage without neighbours."""
    stage = Stage(rank, ranks, ranks)
    engine = TORCH[schedule](stage, count)
    engine._initialize_stage = lambda *_: None
    engine._step_microbatches([()] * count, [{}] * count)
    return stage.seen


def looped(schedule: str, ranks: int, loops: int, count: int) -> Any:
    """Torch's schedule of several stages a rank."""
    stages = [Stage(k * ranks, ranks, ranks * loops) for k in range(loops)]
    return TORCH[schedule](stages, count)


def is_possible(schedule: str, ranks: int, loops: int, count: int) -> bool:
    """Whether we have the schedule for these numbers."""
    try:
        require_schedule(schedule, ranks, loops, count)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", SINGLE)
def test_ranks_of_one_stage_compute_in_the_order_of_torch(schedule: str) -> None:
    cases = [(p, m) for p, n, m in GRID if n == 1 and is_possible(schedule, p, 1, m)]
    assert len(cases) > 20
    for ranks, count in cases:
        for rank in range(ranks):
            expected = run_single(schedule, rank, ranks, count)
            assert rank_order(schedule, rank, ranks, 1, count) == expected


@pytest.mark.parametrize("schedule", LOOPED)
def test_ranks_of_several_stages_compute_in_the_order_of_torch(schedule: str) -> None:
    cases = [case for case in GRID if is_possible(schedule, *case)]
    assert len(cases) > 100
    for ranks, loops, count in cases:
        orders = looped(schedule, ranks, loops, count).pipeline_order
        for rank in range(ranks):
            found = rank_order(schedule, rank, ranks, loops, count)
            expected = [
                (a.stage_index, KINDS[a.computation_type.value], a.microbatch_index)
                for a in orders[rank]
                if a is not None
            ]
            assert found == expected


@pytest.mark.parametrize("schedule", TORCH)
def test_what_torch_refuses_is_refused(schedule: str) -> None:
    for ranks, loops, count in GRID:
        if is_possible(schedule, ranks, loops, count) or (schedule in SINGLE and loops > 1):
            continue
        with pytest.raises(ValueError, match="icrobatches"):
            run_single(schedule, 0, ranks, count) if schedule in SINGLE else looped(
                schedule, ranks, loops, count
            )


@pytest.mark.parametrize("active", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", LOOPED)
def test_gathers_and_reductions_stand_where_torch_puts_them(schedule: str, active: int) -> None:
    for ranks, loops, count in GRID:
        if not is_possible(schedule, ranks, loops, count) or ranks == 3:
            continue
        order = looped(schedule, ranks, loops, count).pipeline_order[0]
        lowered = _add_reduce_grad(_add_unshard_reshard(order, active), count)
        expected = [
            (a.stage_index, KINDS[a.computation_type.value])
            for a in lowered
            if a is not None and a.computation_type.value in KINDS
        ]
        found = with_gathers(rank_order(schedule, 0, ranks, loops, count), active)
        assert [(s, w if isinstance(w, str) else w.kind) for s, w in found] == expected


@pytest.mark.parametrize(
    ("schedule", "loops", "gathers", "on_paper"),
    [
        ("breadth_first", 2, 2, 4), ("breadth_first", 4, 5, 8), ("breadth_first", 8, 13, 16),
        ("interleaved_1f1b", 2, 2, 16), ("interleaved_1f1b", 4, 15, 32),
        ("interleaved_1f1b", 8, 47, 64),
    ],
)  # fmt: skip
def test_gathers_of_two_ranks_and_eight_micro_batches(
    schedule: str, loops: int, gathers: int, on_paper: int
) -> None:
    found = pipeline_timeline(
        schedule,
        pipeline_ranks=2,
        stages_per_rank=loops,
        num_microbatches=8,
        data_parallel="fsdp2",
    )
    assert (found.gathers[0], found.reduces[0], found.paper_gathers) == (gathers, loops, on_paper)


@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_the_paper_counts_runs_of_a_pass_through_a_stage(schedule: str) -> None:
    for ranks, loops, count in GRID:
        if not is_possible(schedule, ranks, loops, count):
            continue
        order, runs = rank_order(schedule, 0, ranks, loops, count), 0
        for kind in ("forward", "backward"):
            stages = [work.stage for work in order if work.kind == kind]
            runs += 1 + sum(a != b for a, b in pairwise(stages))
        found = paper_gathers(
            schedule, pipeline_ranks=ranks, stages_per_rank=loops, num_microbatches=count
        )
        assert found == runs
