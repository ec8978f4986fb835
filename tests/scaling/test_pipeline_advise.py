"""The advisor of pipelines: closed forms against timelines, memory, and the papers' regimes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from lightning_ext.scaling import (
    Links,
    PipelineCluster,
    PipelineModel,
    PipelinePlan,
    advise_pipeline,
    batch_efficiency,
    pipeline_timeline,
    sharded_memory,
)
from lightning_ext.scaling._pipeline._layout import (
    Candidate,
    _exposed_seconds,
    _gathers,
    _Network,
    memory_bytes,
    step_seconds,
)
from lightning_ext.scaling._pipeline._seconds import Shape

WIDTH, TOKENS = 8192, 2048
# 52 B parameters in 64 layers, 150 TFLOP/s.
GPT = PipelineModel(
    layers=64,
    layer_params=12 * WIDTH**2,
    layer_s=6 * 12 * WIDTH**2 * TOKENS / 150e12,
    boundary_bytes=2 * WIDTH * TOKENS,
    stashed_bytes=34 * WIDTH * TOKENS,
)
SLOW, FAST = Links(250e9, 3e9, 5e-6), Links(250e9, 25e9, 5e-6)
ROOM = 80e9
SMALL = PipelineModel(8, 1000, layer_s=0.3, boundary_bytes=10, stashed_bytes=100)
NO_COST = Links(1e30, 1e30)


def best(ranks: int, links: Links, **settings: Any) -> PipelinePlan:
    """The fastest plan of the 52 B GPT at a critical batch of 2,000 samples."""
    return plans(ranks, links, **settings)[0]


def plans(ranks: int, links: Links, **settings: Any) -> list[PipelinePlan]:
    cluster = PipelineCluster(ranks, ROOM, links)
    return advise_pipeline(GPT, cluster, **({"critical_batch": 2000} | settings))


def _shapes() -> list[Shape]:
    looped = product(("breadth_first", "interleaved_1f1b"), (1, 2, 4), (2, 4), (1, 2, 4, 7))
    single = product(("gpipe", "1f1b"), (2, 4, 8), (1,), (1, 2, 4, 7))
    return [Shape(s, p, n, p * turns) for s, p, n, turns in [*looped, *single]]


@pytest.mark.parametrize("send", [0.0, 0.1, 0.5, 1.0])
def test_closed_forms_are_the_timelines(send: float) -> None:
    for shape in _shapes():
        schedule, ranks, loops, count = shape
        found = pipeline_timeline(
            schedule,
            pipeline_ranks=ranks,
            stages_per_rank=loops,
            num_microbatches=count,
            send_ms=send,
        )
        assert shape.seconds(1.0, 2.0, send) == pytest.approx(found.total_ms)
        assert shape.stashed == found.peak_stashed[0]


@pytest.mark.parametrize("reduce", [0.5, 2.0, 8.0, 40.0])
def test_reductions_hide_as_in_the_timelines(reduce: float) -> None:
    for shape in _shapes():
        schedule, ranks, loops, count = shape
        found = pipeline_timeline(
            schedule,
            pipeline_ranks=ranks,
            stages_per_rank=loops,
            num_microbatches=count,
            data_parallel="ddp",
            reduce_ms=reduce,
        )
        waits = _exposed_seconds(shape, 1, 1.0, 2.0, _Network(0.0, reduce, 0, 0), (0, 0))
        assert shape.seconds(1.0, 2.0, 0.0) + waits == pytest.approx(found.total_ms)


def test_one_f_one_b_waits_for_sends_with_any_number_of_micro_batches() -> None:
    for ranks, count in product((2, 3, 5), range(5, 16)):
        found = pipeline_timeline(
            "1f1b", pipeline_ranks=ranks, num_microbatches=count, send_ms=0.25
        )
        shape = Shape("1f1b", ranks, 1, count)
        assert shape.seconds(1.0, 2.0, 0.25) == pytest.approx(found.total_ms)


def test_the_time_to_the_target_is_that_of_the_critical_batch() -> None:
    for plan in plans(64, FAST, min_steps=10.0):
        steps = 10 * batch_efficiency(plan.global_batch, 2000).steps_over_min
        assert plan.target_s == pytest.approx(steps * plan.step_s)


def test_plans_are_in_the_order_of_the_time_to_the_target() -> None:
    times = [plan.target_s for plan in plans(512, SLOW)]
    assert times == sorted(times)
    assert len(times) > 20


def test_all_ranks_are_used_and_no_plan_needs_more_than_there_is() -> None:
    for plan in plans(512, SLOW):
        assert plan.pipeline_ranks * plan.data_parallel_size == 512
        assert plan.memory_bytes <= ROOM
        assert plan.num_microbatches % plan.pipeline_ranks == 0


def test_on_slow_links_breadth_first_wins_with_a_sample_for_each_rank() -> None:
    plan = best(512, SLOW)
    assert (plan.schedule, plan.data_parallel, plan.global_batch) == ("breadth_first", "fsdp2", 512)
    others = ("data_parallel", "gpipe", "1f1b")
    assert best(512, SLOW, schedules=others).target_s > 1.4 * plan.target_s


def test_with_many_samples_for_each_rank_other_schedules_catch_up() -> None:
    def ratio(critical: float) -> float:
        times = [
            best(64, SLOW, critical_batch=critical, schedules=[schedule]).target_s
            for schedule in ("1f1b", "breadth_first")
        ]
        return times[0] / times[1]

    assert ratio(100) > 1.3
    assert ratio(1e6) < 1.05


def test_on_fast_links_few_ranks_need_no_pipeline() -> None:
    assert best(64, FAST).pipeline_ranks == 1


def test_a_small_critical_batch_makes_small_batches_and_many_ranks_useless() -> None:
    assert best(64, FAST, critical_batch=16).global_batch == 64
    gain = [best(64, FAST, critical_batch=c).target_s / best(512, FAST, critical_batch=c).target_s
            for c in (16, 16_000)]  # fmt: skip
    assert gain[0] < 1.5
    assert gain[1] > 6


def test_layered_accumulation_gathers_once_for_all_micro_batches() -> None:
    def sent(schedule: str, count: int) -> float:
        it = Candidate(Shape(schedule, 1, 64, count), "fsdp2", 64, 1, recompute=True)
        return step_seconds(GPT, PipelineCluster(64, ROOM, SLOW), it)[2]

    assert sent("breadth_first", 8) == sent("breadth_first", 1)
    # Three of the layers are still there when the backward passes begin.
    assert sent("breadth_first", 1) == pytest.approx((192 - 3) / 192 * sent("data_parallel", 1))
    # Of three parts of a model two are gathered eight times, and gradients reduced once.
    assert sent("data_parallel", 8) == pytest.approx(17 / 3 * sent("data_parallel", 1))


def test_bytes_of_a_pipeline_are_outputs_and_their_gradients() -> None:
    it = Candidate(Shape("breadth_first", 2, 2, 4), "ddp", 1, 3, recompute=False)
    assert step_seconds(SMALL, PipelineCluster(2, 1e9, NO_COST), it)[2] == 2 * 2 * 4 * 3 * 10


def test_without_costs_of_sending_a_step_is_the_pipeline() -> None:
    it = Candidate(Shape("breadth_first", 2, 2, 4), "fsdp2", 2, 3, recompute=False)
    step_s, compute_s, _ = step_seconds(SMALL, PipelineCluster(4, 1e9, NO_COST), it)
    # Stages of two layers and three samples take 1.8 s; (4·2 + 1) of them.
    assert (step_s, compute_s) == (pytest.approx(9 * 1.8), pytest.approx(8 * 1.8))


def test_recomputation_adds_a_third() -> None:
    it = Candidate(Shape("breadth_first", 2, 2, 4), "fsdp2", 2, 3, recompute=True)
    assert step_seconds(SMALL, PipelineCluster(4, 1e9, NO_COST), it)[0] == pytest.approx(9 * 2.4)


def test_uneven_stages_are_filled_at_their_sizes_and_run_at_the_largest() -> None:
    it = Candidate(Shape("breadth_first", 3, 1, 3), "fsdp2", 1, 1, recompute=False)
    step_s, compute_s, _ = step_seconds(SMALL, PipelineCluster(3, 1e9, NO_COST), it)
    # Of 2, 3 and 3 layers: each once, and the largest for two micro-batches more.
    assert (step_s, compute_s) == (pytest.approx((8 + 2 * 3) * 0.3), pytest.approx(0.3 * 8))


@pytest.mark.parametrize(
    ("shape", "layers", "waits"),
    [
        # Two stages of two layers, 3 s to gather or reduce one, passes of 0.1 s and 0.2 s. What the
        # second sends hides behind the first, and one layer of two behind a pass.
        (Shape("breadth_first", 2, 2, 4), 2, (6 - 0.1 * 4.5) + (6 + 6 - 0.2 * 4.5)),
        # One stage of four layers: gathered once, reduced at the end, behind a pass of itself.
        (Shape("gpipe", 2, 1, 4), 4, (3 - 0.1 * 0.75) + (3 - 0.2 * 0.75)),
        # Two groups of two: three visits of four hide what is gathered.
        (Shape("interleaved_1f1b", 2, 2, 4), 2, (12 - 0.1 * 6.5) + (12 + 6 - 0.2 * 6.5)),
    ],
)
def test_gathers_and_reductions_wait_where_nothing_hides_them(
    shape: Shape, layers: int, waits: float
) -> None:
    slow, paper = _Network(3.0, 3.0, 0, 0), _gathers(shape, "paper")
    assert _exposed_seconds(shape, layers, 0.1, 0.2, slow, paper) == pytest.approx(waits)


def test_a_reduction_hides_behind_the_stages_before_it_but_for_one_layer() -> None:
    quick = _Network(0.0, 0.3, 0, 0)
    slower = quick._replace(reduce_s=1.2)
    late = _exposed_seconds(Shape("breadth_first", 2, 4, 8), 2, 0.1, 0.2, quick, (4, 1))
    alone = _exposed_seconds(Shape("1f1b", 2, 1, 8), 8, 0.4, 0.8, slower, (1, 0))
    assert (late, alone) == (pytest.approx(0.3 / 2), pytest.approx(1.2 - 0.7))


def test_memory_is_states_gathered_stages_and_activations() -> None:
    cluster = PipelineCluster(8, 1e9, FAST, ranks_per_node=4)
    mixed = {"weight_bytes": 2, "gradient_bytes": 2, "optimizer_bytes": 12}

    def used(schedule: str, *, recompute: bool) -> float:
        it = Candidate(Shape(schedule, 2, 2, 4), "fsdp2", 4, 3, recompute=recompute)
        return memory_bytes(SMALL, cluster, it)

    # Two stages of two layers; breadth-first has 8 of them stashed, depth-first 5.
    states = sharded_memory(4000, 4, 4, "fsdp2", **mixed).total
    breadth = states + 2 * 2000 * 2 + 2 * 2000 * 2
    assert used("breadth_first", recompute=False) == breadth + 3 * 8 * 2 * 100
    assert used("breadth_first", recompute=True) == breadth + 3 * (8 * 10 + 2 * 100)
    states = sharded_memory(4000, 4, 4, "fsdp2", **mixed, accumulate=4).total
    assert used("interleaved_1f1b", recompute=False) == states + 2 * 2000 * 2 + 3 * 5 * 2 * 100


def test_what_does_not_fit_is_refused_with_the_least_that_would() -> None:
    with pytest.raises(ValueError, match=r"hold no layout of 8 ranks; the smallest takes \d"):
        plans(8, FAST)


def test_a_batch_without_a_sample_for_each_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one sample for each of 512 ranks"):
        plans(512, FAST, max_global_batch=256)


def test_plans_name_the_rules_that_they_do_not_follow() -> None:
    notes = {plan.schedule: " ".join(plan.notes) for plan in plans(512, FAST, critical_batch=64)}
    assert "than 4 for each pipeline rank (Huang et al. 2019)" in notes["gpipe"]
    assert "above the critical one" in notes["breadth_first"]
    assert "Huang" not in notes["breadth_first"]


def test_the_rule_of_gpipe_is_met_with_four_micro_batches_for_each_rank() -> None:
    found = plans(64, FAST, schedules=["1f1b"], critical_batch=1e5)
    assert any(plan.num_microbatches >= 4 * plan.pipeline_ranks for plan in found)
    for plan in found:
        is_met = plan.num_microbatches >= 4 * plan.pipeline_ranks
        assert is_met != any("Huang" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schedules": ["zb"]}, "schedules="),
        ({"schedules": "gpipe"}, "schedules="),
        ({"data_parallel": []}, "data_parallel="),
        ({"min_steps": 0}, "min_steps=0"),
        ({"critical_batch": -1}, "at least 0"),
        ({"max_micro_batch": 0}, "max_micro_batch=0"),
        ({"max_global_batch": 0}, "max_global_batch=0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        plans(64, FAST, **change)


@pytest.mark.parametrize("field", ["layers", "layer_s", "stashed_bytes", "boundary_bytes"])
def test_a_model_without_size_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1"):
        replace(GPT, **{field: -1})


@pytest.mark.parametrize("field", ["ranks", "memory_bytes", "ranks_per_node"])
def test_a_cluster_without_size_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0"):
        replace(PipelineCluster(8, ROOM, FAST), **{field: 0})


def test_thousands_of_ranks_on_paper() -> None:
    plan = best(4096, SLOW)
    assert plan.schedule == "breadth_first"
    assert 0 < plan.utilization < 1
    assert math.isclose(plan.bubble_fraction, 3 / (4 * 8 + 3))
