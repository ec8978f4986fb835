"""What replicas of a stage send to each other in a batch, counted on the wire."""

from __future__ import annotations

import pytest
from harness import run_distributed

from benchmarks.pipeline_gathers import MICRO_BATCHES, RANKS, Count, counts
from lightning_ext.scaling import pipeline_timeline

WORLD = 4


def of_all(schedule: str, stages_per_rank: int, accumulate: int = 1) -> list[list[Count]]:
    args = (schedule, stages_per_rank, accumulate)
    ranks: list[list[Count]] = run_distributed(counts, WORLD, args=args)
    return ranks


def test_breadth_first_gathers_and_reduces_each_stage_once_and_its_rehearsal_adds_a_gather() -> (
    None
):
    for first, *later in of_all("breadth_first", 2):
        assert first == Count(2 + 2, 2)
        assert later == [Count(2, 2)] * 2


@pytest.mark.parametrize("schedule", ["breadth_first", "gpipe", "1f1b"])
def test_one_stage_is_gathered_and_reduced_once(schedule: str) -> None:
    for _, *later in of_all(schedule, 1):
        assert later == [Count(1, 1)] * 2


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "gathers"),
    [
        ("interleaved_1f1b", 2, [2, 2]),
        pytest.param("breadth_first", 4, [5, 5], marks=pytest.mark.slow),
        ("interleaved_1f1b", 4, [15, 13]),
        pytest.param("breadth_first", 8, [13, 13], marks=pytest.mark.slow),
        pytest.param("interleaved_1f1b", 8, [47, 45], marks=pytest.mark.slow),
    ],
)
def test_more_stages_than_torch_keeps_are_gathered_again_as_the_simulator_says(
    schedule: str, stages_per_rank: int, gathers: list[int]
) -> None:
    timeline = pipeline_timeline(
        schedule,
        pipeline_ranks=RANKS,
        stages_per_rank=stages_per_rank,
        num_microbatches=MICRO_BATCHES,
        data_parallel="fsdp2",
    )
    found = [last for *_, last in of_all(schedule, stages_per_rank)]
    assert [one.gathers for one in found] == gathers * 2  # of both pipelines
    assert list(timeline.gathers) == gathers
    assert {one.reduces for one in found} == {stages_per_rank} == {*timeline.reduces}


def test_with_accumulation_the_last_batch_of_a_window_alone_is_reduced() -> None:
    for found in of_all("breadth_first", 2, 2):
        assert [one.reduces for one in found] == [0, 2, 2]  # the third batch ends the epoch
        assert [one.gathers for one in found[1:]] == [2, 2]
