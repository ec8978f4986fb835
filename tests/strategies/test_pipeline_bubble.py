"""The idle time of ranks, measured with layers that sleep, is the simulator's."""

from __future__ import annotations

import pytest
from harness import run_distributed

from benchmarks.pipeline_bubble import SCHEDULES, Idle, measured, modelled


def on_two_ranks(
    schedule: str, micro_batches: int, batches: int, forward_ms: float, backward_ms: float
) -> Idle:
    args = (schedule, micro_batches, batches, forward_ms, backward_ms)
    found: Idle = run_distributed(measured, args=args)[0]
    return found


@pytest.mark.parametrize("schedule", ["gpipe", "breadth_first"])
def test_a_batch_takes_as_long_as_the_simulator_says(schedule: str) -> None:
    found, paper = on_two_ranks(schedule, 2, 3, 100, 100), modelled(schedule, 2, 100, 100)
    assert found.total_ms == pytest.approx(paper.total_ms, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_within_a_tenth_of_the_simulator(schedule: str) -> None:
    found, paper = on_two_ranks(schedule, 4, 4, 400, 800), modelled(schedule, 4, 400, 800)
    assert found.bubble_fraction == pytest.approx(paper.bubble_fraction, rel=0.1)
    assert found.total_ms == pytest.approx(paper.total_ms, rel=0.02)
