"""The search for the largest size that passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ext.scaling import Bracket, largest_passing, merge_ceilings

sizes = st.integers(1, 10**6)
tolerances = st.floats(0, 0.5)


class Memory:
    """Passes up to a limit, and remembers what it was asked."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[int] = []

    def __call__(self, size: int) -> bool:
        self.asked.append(size)
        return size <= self.limit


def test_it_doubles_and_then_bisects() -> None:
    memory = Memory(100)
    found = largest_passing(memory, start=8, largest=4096)
    assert memory.asked == [8, 16, 32, 64, 128, 96, 112, 104, 100]
    assert found == Bracket(100, 104)


def test_it_halves_where_the_first_fails() -> None:
    memory = Memory(5)
    assert largest_passing(memory, start=64, largest=4096) == Bracket(5, 6)
    assert memory.asked == [64, 32, 16, 8, 4, 6, 5]


def test_not_even_one() -> None:
    memory = Memory(0)
    assert largest_passing(memory, start=4, largest=64) == Bracket(0, 1)
    assert memory.asked == [4, 2, 1]


def test_the_largest_of_interest_is_tried_and_nothing_above() -> None:
    memory = Memory(10**9)
    assert largest_passing(memory, start=3, largest=20).passed == 20
    assert memory.asked == [3, 6, 12, 20]


def test_a_start_above_the_largest_is_cut() -> None:
    memory = Memory(10**9)
    assert largest_passing(memory, start=64, largest=20).passed == 20
    assert memory.asked == [20]


def test_what_is_known_narrows_the_search() -> None:
    memory = Memory(100)
    assert largest_passing(memory, largest=200, known=Bracket(96, 128)) == Bracket(100, 104)
    assert memory.asked == [112, 104, 100]


@pytest.mark.parametrize("largest", [40, 96, 97, 99])
def test_what_is_known_well_enough_costs_no_trial(largest: int) -> None:
    memory = Memory(98)
    assert largest_passing(memory, largest=largest, known=Bracket(96, 100)) == Bracket(96, 100)
    assert memory.asked == []


def test_below_a_known_failure_the_largest_of_interest_comes_first() -> None:
    memory = Memory(80)
    assert largest_passing(memory, largest=60, known=Bracket(50, 100)) == Bracket(60, 100)
    assert memory.asked == [60]


@given(limit=sizes, start=sizes, largest=sizes, tolerance=tolerances)
def test_the_answer_passes_and_little_more_fails(
    limit: int, start: int, largest: int, tolerance: float
) -> None:
    memory = Memory(limit)
    found = largest_passing(memory, start=start, largest=largest, tolerance=tolerance).passed
    assert 1 <= found <= min(limit, largest)
    more = max(found + 1, math.ceil(found / (1 - tolerance)))
    assert found == largest or more > limit


@given(limit=sizes, start=sizes, largest=sizes, tolerance=st.floats(0.01, 0.5))
def test_trials_are_few_and_none_comes_twice(
    limit: int, start: int, largest: int, tolerance: float
) -> None:
    memory = Memory(limit)
    largest_passing(memory, start=start, largest=largest, tolerance=tolerance)
    assert len(set(memory.asked)) == len(memory.asked)
    assert len(memory.asked) <= math.log2(largest) + math.log2(1 / tolerance) + 3


@given(limit=sizes, first=sizes, second=sizes, start=sizes)
def test_two_searches_never_ask_the_same(limit: int, first: int, second: int, start: int) -> None:
    memory = Memory(limit)
    known = largest_passing(memory, start=start, largest=first)
    again = largest_passing(memory, start=start, largest=second, known=known)
    assert len(set(memory.asked)) == len(memory.asked)
    assert again.passed <= limit < (again.failed or math.inf)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start": 0}, ValueError, "start"),
        ({"largest": 0}, ValueError, "largest"),
        ({"largest": 2.0}, TypeError, "largest must be an int"),
        ({"tolerance": 1.0}, ValueError, "tolerance"),
        ({"tolerance": math.nan}, ValueError, "tolerance"),
    ],
)
def test_arguments_out_of_range_are_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        largest_passing(Memory(1), **{"largest": 8, **change})


def test_neighbours_with_equal_ceilings_become_the_longest() -> None:
    ceilings = {512: 8, 64: 32, 128: 32, 256: 16, 1024: 8, 2048: 16}
    assert merge_ceilings(ceilings) == {128: 32, 256: 16, 1024: 8, 2048: 16}
    assert merge_ceilings({}) == {}
