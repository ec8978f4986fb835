"""Schedules made from gradient norms, and the tables that hold them."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from lightning_ext.scaling import FactorTable, refined_factors


def test_five_steps_by_hand() -> None:
    # w = 1, 1/4, 1/16, 1/4, 1; the sums after each: 25/16, 21/16, 5/4, 1, 0.
    expected = [25 / 16, 21 / 64, 5 / 64, 1 / 4, 0]
    found = refined_factors([1.0, 2.0, 4.0, 2.0, 1.0], width=0)
    assert found == pytest.approx([value / (25 / 16) for value in expected], rel=1e-15)


def test_five_steps_by_hand_for_adams_kin() -> None:
    # w = 1, 1/2, 1/4, 1/2, 1; the sums after each: 9/4, 7/4, 3/2, 1, 0.
    expected = [9 / 4, 7 / 8, 3 / 8, 1 / 2, 0]
    found = refined_factors([1.0, 2.0, 4.0, 2.0, 1.0], width=0, norm="l1")
    assert found == pytest.approx([value / (9 / 4) for value in expected], rel=1e-15)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("steps", [2, 3, 10, 1001])
def test_equal_norms_give_the_straight_line(norm: str, steps: int) -> None:
    found = refined_factors([0.7] * steps, norm=norm)
    line = [1 - step / (steps - 1) for step in range(steps)]
    assert max(abs(a - b) for a, b in zip(found, line, strict=True)) < 1e-13


def test_large_norms_at_the_begin_make_a_warm_up() -> None:
    found = refined_factors([8.0] * 10 + [4.0] * 10 + [1.0] * 180, norm="l2")
    assert found[0] < found[12] < found[20] == 1


def test_small_norms_at_the_end_keep_the_rate_up_then_drop_it() -> None:
    found = refined_factors([1.0] * 100 + [1 - step / 120 for step in range(100)])
    line = [1 - step / 199 for step in range(200)]
    assert found[150] > line[150] + 0.1
    assert found[-1] == 0


def test_the_scale_of_the_norms_does_not_matter_even_far_from_1() -> None:
    norms = [1.0, 3.0, 2.0, 0.5, 1.5, 4.0, 2.5, 1.0]
    for scale in (1e-170, 1e170):
        scaled = refined_factors([scale * g for g in norms], width=0.3)
        assert scaled == pytest.approx(refined_factors(norms, width=0.3), rel=1e-12)


def median_by_the_definition(norms: list[float], half: int) -> list[float]:
    padded = [norms[0]] * half + norms + (norms[::-1][:half] if half else [])
    return [statistics.median(padded[i : i + 2 * half + 1]) for i in range(len(norms))]


@pytest.mark.parametrize("width", [0.0, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("steps", [2, 7, 60])
def test_the_norms_are_smoothed_by_a_median_first(width: float, steps: int) -> None:
    rng = random.Random(steps)
    norms = [rng.choice([0.5, 1.0, rng.random() + 0.1]) for _ in range(steps)]
    smooth = median_by_the_definition(norms, int(width * steps / 2))
    assert refined_factors(norms, width=width) == refined_factors(smooth, width=0)


def test_a_few_outliers_leave_no_trace() -> None:
    norms = [1.0] * 100
    for index in (3, 40, 41, 97):
        norms[index] = 1e6
    assert refined_factors(norms) == refined_factors([1.0] * 100)
    assert refined_factors(norms, width=0) != refined_factors([1.0] * 100)


@pytest.mark.parametrize(
    ("norms", "kwargs", "message"),
    [
        ([], {}, "0 gradient norms"),
        ([1.0], {}, "1 gradient norms"),
        ([1.0, -1.0], {}, "gradient norm=-1.0"),
        ([1.0, float("inf")], {}, "gradient norm=inf"),
        ([1.0, float("nan")], {}, "gradient norm=nan"),
        ([1.0, 0.0, 0.0, 1.0], {}, "smoothed gradient norm is 0"),
        ([1.0, 1.0], {"width": 1.5}, "width=1.5"),
        ([1.0, 1.0], {"norm": "linf"}, "norm='linf' is not known"),
    ],
)
def test_norms_that_make_no_schedule_are_refused(
    norms: list[float], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refined_factors(norms, **kwargs)


TABLE = FactorTable((8, 16, 64), (0.5, 1.0, 0.25), 8)


def test_a_table_is_linear_between_its_entries_and_constant_outside() -> None:
    assert [TABLE.at(n) for n in (0, 8, 12, 16, 40, 64, 65, 10**9)] == [
        0.5,
        0.5,
        0.75,
        1.0,
        0.625,
        0.25,
        0.25,
        0.25,
    ]


def test_a_stretched_table_has_the_same_values_at_the_same_shares() -> None:
    for samples in range(0, 80, 3):
        stretched = TABLE.at(10 * samples, total_samples=640)
        assert stretched == pytest.approx(TABLE.at(samples), abs=1e-15)


def test_a_table_of_one_entry_is_a_constant() -> None:
    assert {FactorTable((0,), (0.3,)).at(n, total_samples=9) for n in (0, 5, 99)} == {0.3}


def test_a_table_survives_its_text() -> None:
    table = FactorTable((0, 64, 128.5), (1.0, 0.1 + 0.2, 0.0), 64)
    assert FactorTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("samples", "factors", "message"),
    [
        ((), (), "0 positions"),
        ((0, 1), (1.0,), "2 positions and 1 factors"),
        ((0, 5, 5), (1.0, 1.0, 1.0), "position 5 follows 5"),
        ((0, 5, 4), (1.0, 1.0, 1.0), "position 4 follows 5"),
        ((-1, 5), (1.0, 1.0), "position=-1"),
        ((0, 5), (1.0, -0.1), "factor=-0.1"),
    ],
)
def test_a_table_that_is_none_is_refused(
    samples: tuple[float, ...], factors: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FactorTable(samples, factors)


def test_a_text_that_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table of factors"):
        FactorTable.from_json('{"samples": [0]}')


def test_lengths_of_a_stretched_table_are_checked() -> None:
    with pytest.raises(ValueError, match="total_samples=0"):
        TABLE.at(0, total_samples=0)
