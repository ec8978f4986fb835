"""Cutting a row into consecutive parts of like sums."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ext.scaling import balanced_split


def sums(costs: Sequence[float], starts: Sequence[int]) -> list[float]:
    return [sum(costs[a:b]) for a, b in pairwise([*starts, len(costs)])]


def score(costs: Sequence[float], starts: Sequence[int]) -> tuple[float, float]:
    found = sums(costs, starts)
    return max(found), sum(one**2 for one in found)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    costs = draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    return costs, draw(st.integers(1, len(costs)))


@given(rows())
def test_no_other_cut_is_better(row: tuple[list[int], int]) -> None:
    costs, parts = row
    cuts = combinations(range(1, len(costs)), parts - 1)
    best = min(score(costs, [0, *cut]) for cut in cuts)
    assert score(costs, balanced_split(costs, parts)) == best


@given(rows())
def test_no_part_is_empty(row: tuple[list[int], int]) -> None:
    costs, parts = row
    starts = balanced_split(costs, parts)
    assert len(starts) == parts
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise([*starts, len(costs)]))


def test_of_cuts_with_the_same_greatest_sum_the_most_even_one_is_taken() -> None:
    assert sums([6, 1, 1, 1, 1], balanced_split([6, 1, 1, 1, 1], 3)) == [6, 2, 2]
    # The beginning alone is best cut 3 + 3, 6, with a greater sum of squares in the end.
    costs = [3, 3, 6, 1, 7, 7, 0]
    cuts = combinations(range(1, len(costs)), 4)
    best = min(score(costs, [0, *cut]) for cut in cuts)
    assert score(costs, balanced_split(costs, 5)) == best


@pytest.mark.parametrize(
    ("costs", "parts", "error", "told"),
    [
        ([1.0, -1.0], 1, ValueError, "costs"),
        ([1.0, float("nan")], 1, ValueError, "costs"),
        ([1.0], 2, ValueError, "parts=2 is more than the 1 elements of costs"),
        ([1.0], 0, ValueError, "parts"),
        ([1.0], 1.0, TypeError, "parts"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(
    costs: list[float], parts: int, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        balanced_split(costs, parts)
