"""Timelines of pipelines: bubbles against the formulas, waiting, stashes, text and figures."""

from __future__ import annotations

import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from lightning_ext.scaling import (
    PIPELINE_SCHEDULES,
    PipelineAction,
    PipelineTimeline,
    bubble_fraction,
    bubble_overhead,
    pipeline_timeline,
)

ONE_STAGE = ("gpipe", "1f1b")


def timeline(schedule: str, ranks: int, loops: int, count: int, **costs: Any) -> PipelineTimeline:
    return pipeline_timeline(
        schedule, pipeline_ranks=ranks, stages_per_rank=loops, num_microbatches=count, **costs
    )


def shapes(schedule: str) -> list[tuple[int, int, int]]:
    """Pipeline ranks, stages of each, and micro-batches, at least as many as ranks."""
    loops = (1,) if schedule in ONE_STAGE else (1, 2, 3, 4)
    return [(p, n, p * turns) for p, n, turns in product((1, 2, 3, 4, 6), loops, (1, 2, 3))]


@pytest.mark.parametrize(("forward_ms", "backward_ms"), [(1, 2), (1, 1), (3, 1)])
@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_the_bubble_is_that_of_the_formula(
    schedule: str, forward_ms: float, backward_ms: float
) -> None:
    for ranks, loops, count in shapes(schedule):
        found = timeline(
            schedule, ranks, loops, count, forward_ms=forward_ms, backward_ms=backward_ms
        )
        ideal = loops * count * (forward_ms + backward_ms)
        assert found.bubble_fraction == pytest.approx(bubble_fraction(ranks, count, loops))
        assert found.total_ms / ideal - 1 == pytest.approx(bubble_overhead(ranks, count, loops))


@pytest.mark.parametrize("schedule", ["breadth_first", "interleaved_1f1b"])
def test_with_fewer_micro_batches_than_ranks_the_formula_is_too_small(schedule: str) -> None:
    assert timeline(schedule, 4, 2, 3).bubble_fraction > bubble_fraction(4, 3, 2) + 0.01
    assert timeline(schedule, 4, 1, 3).bubble_fraction == pytest.approx(bubble_fraction(4, 3))


@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_no_pass_starts_before_its_input_is_there_nor_overlaps_another(schedule: str) -> None:
    loops = 1 if schedule in ONE_STAGE else 3
    found = timeline(schedule, 3, loops, 6, forward_ms=1.5, backward_ms=2.5, send_ms=0.75)
    passes = {(a.stage, a.kind, a.micro_batch): a for a in found.actions}
    assert len(passes) == 2 * 3 * loops * 6
    for (stage, kind, micro_batch), a in passes.items():
        if kind == "forward" and stage:
            assert a.start_ms >= passes[stage - 1, kind, micro_batch].end_ms + 0.75
        if kind == "backward" and stage < 3 * loops - 1:
            assert a.start_ms >= passes[stage + 1, kind, micro_batch].end_ms + 0.75
    for rank in range(3):
        own = found.of_rank(rank, is_pass=True)
        assert all(a.end_ms <= b.start_ms for a, b in pairwise(own))


def test_breadth_first_hides_sends_behind_further_micro_batches() -> None:
    def lost(schedule: str, count: int) -> float:
        late, free = (timeline(schedule, 4, 2, count, send_ms=s).total_ms for s in (0.5, 0))
        return late - free

    fill = 2 * (4 - 1) * 0.5
    assert lost("breadth_first", 8) == pytest.approx(fill)
    assert lost("breadth_first", 4) == pytest.approx(fill + 2 * 4 * 0.5)
    assert lost("interleaved_1f1b", 8) == pytest.approx(fill + 2 * 4 * 0.5)


def test_one_rank_sends_nothing() -> None:
    assert timeline("breadth_first", 1, 3, 2, send_ms=9).total_ms == 3 * 2 * 3


def test_a_slow_stage_holds_up_the_others() -> None:
    found = timeline("gpipe", 2, 1, 4, forward_ms=[1, 3], backward_ms=[2, 6])
    # The slow rank waits for one forward pass, and the quick one ends after it.
    assert found.total_ms == 1 + 4 * (3 + 6) + 2
    assert found.idle_ms == (39 - 4 * 3, 39 - 4 * 9)


@pytest.mark.parametrize(
    ("schedule", "loops", "peaks"),
    [("gpipe", 1, (8,) * 4), ("breadth_first", 2, (16,) * 4), ("1f1b", 1, (4, 3, 2, 1)),
     ("interleaved_1f1b", 2, (11, 9, 7, 5))],
)  # fmt: skip
def test_schedules_differ_in_what_they_stash(
    schedule: str, loops: int, peaks: tuple[int, ...]
) -> None:
    assert timeline(schedule, 4, loops, 8).peak_stashed == peaks


@pytest.mark.parametrize(
    ("data_parallel", "gathers", "reduces"),
    [(None, (0, 0), (0, 0)), ("ddp", (0, 0), (4, 4)), ("fsdp2", (5, 5), (4, 4))],
)
def test_data_parallelism_decides_what_is_sent(
    data_parallel: str | None, gathers: tuple[int, ...], reduces: tuple[int, ...]
) -> None:
    found = timeline("breadth_first", 2, 4, 8, data_parallel=data_parallel)
    assert (found.gathers, found.reduces) == (gathers, reduces)


def test_breadth_first_hides_reductions_behind_the_stages_before() -> None:
    def waited(schedule: str) -> float:
        loops = 1 if schedule == "1f1b" else 4
        sizes = {"forward_ms": 4 / loops, "backward_ms": 8 / loops, "reduce_ms": 16 / loops}
        found = timeline(schedule, 2, loops, 4, data_parallel="ddp", **sizes)
        last = max(a.end_ms for a in found.actions if a.micro_batch is not None)
        return found.total_ms - last

    # Rank 0 ends last; of its four reductions of 4 ms one is left, of one of 16 ms all.
    assert (waited("breadth_first"), waited("1f1b")) == (4, 16)


def test_a_pass_waits_for_its_stage_to_be_gathered() -> None:
    found = timeline("breadth_first", 1, 2, 1, data_parallel="fsdp2", gather_ms=3)
    assert found.actions[:4] == (
        PipelineAction(0, 0, "gather", None, 0, 3),
        PipelineAction(0, 1, "gather", None, 3, 6),
        PipelineAction(0, 0, "forward", 0, 3, 4),
        PipelineAction(0, 1, "forward", 0, 6, 7),
    )


def test_a_stage_is_gathered_once_the_last_pass_leaves_room() -> None:
    found = timeline(
        "breadth_first", 1, 2, 2, data_parallel="fsdp2", gather_ms=3, max_active_stages=1
    )
    starts = [a.start_ms for a in found.actions if a.kind == "gather"]
    assert (starts, found.gathers) == ([0, 5, 14], (3,))


def test_text_names_stage_and_micro_batch_in_each_slot() -> None:
    assert timeline("breadth_first", 2, 2, 2).text().splitlines() == [
        "rank 0  A0 A1 B0 B1 .  .  .  b1 -- b0 -- a1 -- a0 --",
        "rank 1  .  A0 A1 B0 B1 b1 -- b0 -- a1 -- a0 -- .  .",
    ]


def test_text_shows_what_is_in_the_middle_of_a_slot() -> None:
    text = timeline("1f1b", 1, 1, 11, forward_ms=1, backward_ms=3).text(slot_ms=4)
    assert text == "rank 0  " + " ".join(f"a{m}".ljust(3) for m in range(11)).rstrip()


def test_passes_that_cost_nothing_have_a_text() -> None:
    assert timeline("1f1b", 1, 1, 1, forward_ms=0, backward_ms=0).text() == "rank 0  ."


@pytest.mark.parametrize(
    ("slot_ms", "error"), [(0, "must be finite and above 0"), (1e-5, "the most is 10000")]
)
def test_slots_out_of_range_are_refused(slot_ms: float, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        timeline("gpipe", 2, 1, 2).text(slot_ms)


def test_a_figure_has_a_row_for_each_rank_and_names_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    found = timeline("breadth_first", 3, 2, 4, data_parallel="fsdp2", gather_ms=1, reduce_ms=1)
    figure = found.figure(path)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "rank 0", "rank 1", "rank 2",
    ]  # fmt: skip
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "local stage 0, forward", "local stage 0, backward", "local stage 1, forward",
        "local stage 1, backward", "gather", "reduce",
    }  # fmt: skip
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_ext\[examples\]"):
        timeline("gpipe", 2, 1, 2).figure()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pipeline_ranks": 0}, "pipeline_ranks=0 is not allowed"),
        ({"stages_per_rank": 2}, "stages_per_rank=2 does not go with 1f1b"),
        ({"num_microbatches": 1}, "1f1b needs as many"),
        ({"schedule": "zb"}, "schedule='zb' is unknown"),
        ({"schedule": "interleaved_1f1b", "num_microbatches": 5}, "does not divide into 2 rounds"),
        ({"data_parallel": "zero3"}, "data_parallel='zero3' is unknown"),
        ({"max_active_stages": 0}, "max_active_stages=0 is not allowed"),
        ({"forward_ms": [1.0]}, "forward_ms has 1 numbers for 2 stages"),
        ({"backward_ms": [1.0, -1.0]}, r"backward_ms\[1\]=-1.0 is not allowed"),
        ({"send_ms": -1}, "send_ms=-1 is not allowed"),
    ],
)
def test_what_makes_no_timeline_is_refused(change: dict[str, Any], error: str) -> None:
    settings = {"schedule": "1f1b", "pipeline_ranks": 2, "num_microbatches": 4} | change
    with pytest.raises(ValueError, match=error):
        pipeline_timeline(**settings)


@pytest.mark.parametrize("forward_ms", ["1", None, [1.0, None]])
def test_what_is_no_time_is_refused(forward_ms: Any) -> None:
    with pytest.raises(TypeError, match="forward_ms"):
        timeline("gpipe", 2, 1, 2, forward_ms=forward_ms)
