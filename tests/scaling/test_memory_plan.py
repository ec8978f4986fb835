"""Numbers of a plan, and the formulas of what is whole for a while."""

from __future__ import annotations

import pytest

from lightning_ext.scaling import MemoryPlan, pipeline_timeline


def plan(strategy: str = "single", ranks: int = 1, **parts: float) -> MemoryPlan:
    sizes = {"weights": 4.0, "gradients": 4.0, "states": 8.0, "activations": 0.0} | parts
    return MemoryPlan(strategy, ranks, 10, **{f"{k}_bytes": v for k, v in sizes.items()})


def test_the_total_is_the_sum_of_all_parts() -> None:
    assert plan(activations=20, buffers=1, gathered=2, copies=3).total_bytes == 42


@pytest.mark.parametrize("name", ["weights", "gradients", "states", "activations", "gathered"])
def test_the_largest_part_binds_and_the_advice_begins_with_it(name: str) -> None:
    found = plan(**{name: 100.0})
    assert found.binds == name
    assert found.advice.startswith(name.capitalize())


def test_states_are_advised_fewer_bits_and_activations_a_smaller_micro_batch() -> None:
    assert "int8" in plan().advice
    assert "fsdp2" in plan().advice
    assert "smaller micro-batch" in plan(activations=100).advice


def test_under_sharding_more_ranks_are_advised() -> None:
    assert "more ranks" in plan("fsdp2", 8).advice


def test_the_largest_micro_batch_takes_activations_in_proportion() -> None:
    assert plan(activations=20).largest_micro_batch(100, margin=0) == 42


def test_the_table_has_a_row_for_each_part_that_is_there() -> None:
    rows = str(plan(activations=20)).splitlines()
    assert rows[0] == "single on 1 rank, micro_batch 10; of a rank:"
    assert [row.split()[0] for row in rows[1:6]] == [
        *("weights", "gradients", "states", "activations", "total")
    ]


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="states_bytes"):
        plan(states=-1)


def test_two_neighbours_and_the_root_are_gathered() -> None:
    assert MemoryPlan.gathered([5, 1, 4, 3], root=2) == 9
    assert MemoryPlan.gathered([5]) == 5
    assert MemoryPlan.gathered([], root=2) == 2


def test_stages_in_flight_are_weighed_by_their_bytes() -> None:
    for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "breadth_first"):
        loops = 1 if schedule in ("gpipe", "1f1b") else 2
        found = pipeline_timeline(
            schedule, pipeline_ranks=2, stages_per_rank=loops, num_microbatches=4
        )
        equal = MemoryPlan.in_flight(found, [7] * (2 * loops))
        assert equal == tuple(7 * count for count in found.peak_stashed)


def test_the_last_rank_of_1f1b_has_one_micro_batch_in_flight() -> None:
    found = pipeline_timeline("1f1b", pipeline_ranks=4, num_microbatches=8)
    assert MemoryPlan.in_flight(found, [1, 1, 1, 100]) == (4, 3, 2, 100)


def test_bytes_of_another_number_of_stages_are_refused() -> None:
    found = pipeline_timeline("gpipe", pipeline_ranks=2, num_microbatches=2)
    with pytest.raises(ValueError, match="3 numbers for 2 stages"):
        MemoryPlan.in_flight(found, [1, 1, 1])


def test_breadth_first_has_gradients_of_two_stages_whole() -> None:
    weights, gradients = [1, 2, 3, 4], [10, 20, 30, 40]
    assert MemoryPlan.gathered_stages(weights, gradients, breadth_first=True) == 9 + 70
    assert MemoryPlan.gathered_stages(weights, gradients, breadth_first=False) == 9
