"""Uneven stages, slow sends and torch's gathers on paper, against timelines and orders."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from lightning_ext.scaling import (
    Links,
    PipelineCluster,
    PipelineModel,
    advise_pipeline,
    balanced_split,
    pipeline_timeline,
)
from lightning_ext.scaling._pipeline import _stages
from lightning_ext.scaling._pipeline._gathers import GATHER, torch_gathers, with_gathers
from lightning_ext.scaling._pipeline._layout import (
    Candidate,
    _exposed_seconds,
    _gathers,
    _Network,
    memory_bytes,
)
from lightning_ext.scaling._pipeline._orders import rank_order
from lightning_ext.scaling._pipeline._seconds import Shape
from lightning_ext.scaling._pipeline._stages import (
    batch_seconds,
    fullest_ranks,
    stage_layers,
    stashed_layers,
)
from lightning_ext.scaling._pipeline._timeline import PipelineTimeline

SCHEDULES = {"gpipe": (1,), "1f1b": (1,), "breadth_first": (2, 3), "interleaved_1f1b": (2, 3)}
SHAPES = [
    Shape(schedule, ranks, loops, turns * ranks)
    for schedule, some in SCHEDULES.items()
    for loops, ranks, turns in product(some, (2, 3, 4), (1, 2, 5))
]


def timeline(shape: Shape, sizes: tuple[int, ...], send: float) -> PipelineTimeline:
    return pipeline_timeline(
        shape.schedule,
        pipeline_ranks=shape.pipeline_ranks,
        stages_per_rank=shape.stages_per_rank,
        num_microbatches=shape.num_microbatches,
        forward_ms=sizes,
        backward_ms=[2.0 * size for size in sizes],
        send_ms=send,
    )


def sizes_of(shape: Shape, more: int) -> tuple[int, ...]:
    stages = shape.pipeline_ranks * shape.stages_per_rank
    return stage_layers(stages + more % stages, shape)


@pytest.mark.parametrize("more", [0, 1, 3, 7])
@pytest.mark.parametrize("send", [0.0, 0.3, 3.0])
def test_seconds_are_those_of_timelines(more: int, send: float) -> None:
    for shape in SHAPES:
        sizes = sizes_of(shape, more)
        found = timeline(shape, sizes, send).total_ms
        assert batch_seconds(shape, sizes, 1.0, 2.0, send) == pytest.approx(found)


def test_breadth_first_is_exact_with_fewer_micro_batches_than_ranks() -> None:
    for ranks, count in ((4, 1), (4, 3), (6, 2)):
        shape = Shape("breadth_first", ranks, 2, count)
        sizes = sizes_of(shape, 3)
        found = timeline(shape, sizes, 0.5).total_ms
        assert batch_seconds(shape, sizes, 1.0, 2.0, 0.5) == pytest.approx(found)


def test_what_is_too_large_to_replay_is_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stages, "_MOST_PASSES", 0)

    def ratios(more: int, send: float) -> list[float]:
        return [
            batch_seconds(shape, sizes, 1.0, 2.0, send) / timeline(shape, sizes, send).total_ms
            for shape in SHAPES
            for sizes in [sizes_of(shape, more)]
        ]

    slow = ratios(0, 3.0)
    assert min(slow) > 1 - 1e-9
    assert 1.2 < max(slow) < 2
    different = ratios(3, 0.5) + ratios(3, 1.0)
    assert 0.87 < min(different) < 1 < max(different) < 1.25


@pytest.mark.parametrize("more", [0, 1, 3, 7])
def test_stashed_layers_are_those_of_the_timelines(more: int) -> None:
    for shape in SHAPES:
        sizes = sizes_of(shape, more)
        found = timeline(shape, sizes, 0.0)
        peaks = []
        for rank in range(shape.pipeline_ranks):
            kept = [0]
            for each in found.of_rank(rank, is_pass=True):
                kept.append(kept[-1] + sizes[each.stage] * (1 - 2 * (each.kind == "backward")))
            peaks.append(max(kept))
        assert [stashed_layers(shape, r, sizes) for r in range(len(peaks))] == peaks
        assert max(peaks[rank] for rank in fullest_ranks(sizes, len(peaks))) == max(peaks)


def test_layers_are_cut_as_the_strategy_cuts_equal_ones() -> None:
    for layers, stages in product((8, 10, 31), (3, 4, 7)):
        starts = balanced_split([1.0] * layers, stages)
        cut = [b - a for a, b in pairwise([*starts, layers])]
        assert stage_layers(layers, Shape("gpipe", stages, 1, stages)) == tuple(cut)


def test_memory_has_the_layers_that_a_rank_has() -> None:
    model = PipelineModel(96, 1000, layer_s=1.0, boundary_bytes=1, stashed_bytes=0.0)
    cluster = PipelineCluster(8, 1e9, Links(1e15, 1e15))
    used = [
        memory_bytes(
            model, cluster, Candidate(Shape("breadth_first", 8, n, 16), "ddp", 1, 1, False)
        )
        for n in (6, 8, 12)
    ]
    assert used[0] == used[1] == used[2] == 12 * 1000 * 16


@pytest.mark.parametrize("schedule", ["breadth_first", "interleaved_1f1b"])
def test_torch_gathers_are_those_of_its_orders(schedule: str) -> None:
    for ranks, loops, turns in product((2, 3, 4), (1, 2, 3, 4, 5, 8), (1, 2, 3, 5)):
        count = turns * ranks
        order = with_gathers(rank_order(schedule, 0, ranks, loops, count), 3)
        found = torch_gathers(
            schedule, pipeline_ranks=ranks, stages_per_rank=loops, num_microbatches=count
        )
        assert found == sum(work == GATHER for _, work in order)


@pytest.mark.parametrize("gather", [0.5, 4.0, 20.0])
@pytest.mark.parametrize(
    ("schedule", "loops", "least"),
    [
        ("breadth_first", 2, 1.0),
        ("breadth_first", 4, 1.0),
        ("interleaved_1f1b", 2, 1.0),
        ("interleaved_1f1b", 4, 0.85),
    ],
)
def test_waits_for_torch_gathers_are_those_of_timelines(
    schedule: str, loops: int, least: float, gather: float
) -> None:
    shape = Shape(schedule, 2, loops, 8)
    found = pipeline_timeline(
        schedule,
        pipeline_ranks=2,
        stages_per_rank=loops,
        num_microbatches=8,
        gather_ms=gather,
        reduce_ms=gather,
        data_parallel="fsdp2",
    )
    network = _Network(gather, gather, 0, 0)
    waits = _exposed_seconds(shape, 1, 1.0, 2.0, network, _gathers(shape, "torch"))
    ratio = (shape.seconds(1.0, 2.0, 0.0) + waits) / found.total_ms
    assert least - 1e-9 <= ratio <= 1 + 1e-9


def test_depth_first_sends_more_if_one_stage_is_held_at_a_time() -> None:
    model = PipelineModel(16, 10_000, layer_s=0.1, boundary_bytes=10, stashed_bytes=100)
    cluster = PipelineCluster(8, 1e9, Links(1e9, 1e9))

    def sent(gathers: str) -> float:
        plans = advise_pipeline(
            model,
            cluster,
            critical_batch=1e6,
            schedules=["interleaved_1f1b"],
            data_parallel=["fsdp2"],
            max_global_batch=64,
            gathers=gathers,
        )
        chosen = (each for each in plans if (each.pipeline_ranks, each.stages_per_rank) == (2, 2))
        return next(chosen).sent_bytes

    assert sent("paper") > 3 * sent("torch")
    with pytest.raises(ValueError, match="gathers="):
        sent("none")
