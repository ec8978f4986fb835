"""The batch of the most progress per second, and the model of the step time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_ext.scaling import GoodputRule, NoiseScale, Observation, StepTime, batch_efficiency

TRUE = StepTime(0.05, 0.01, 0.002)
SIZES = [(m, k) for m in (1, 4, 16, 64) for k in (1, 2, 8)]
NOISE = NoiseScale(512.0, 400.0, 700.0, 0.5, 256.0, 6400)
SEEN = Observation(
    64,
    6400,
    NOISE,
    reference_batch=64,
    max_global_batch=4096,
    step_seconds=lambda batch: 0.1 + 0.001 * batch,
)


def _rows(sizes, weight: float = 10.0) -> list[tuple[float, float, float, float]]:
    return [(m, k, TRUE.seconds(m, k), weight) for m, k in sizes]


def _propose(rule: GoodputRule, **changes):
    answer = rule.propose(replace(SEEN, **changes))
    assert answer is not None
    return answer


def test_a_step_costs_its_passes_and_what_it_has_anyway() -> None:
    assert TRUE.seconds(16, 4) == pytest.approx(0.05 + 4 * (0.01 + 16 * 0.002))


def test_exact_times_give_the_coefficients_back() -> None:
    assert StepTime.fit(_rows(SIZES)) == pytest.approx(TRUE, rel=1e-6)


def test_noisy_times_give_them_to_their_noise() -> None:
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal(len(SIZES))
    rows = [(m, k, s * x, w) for (m, k, s, w), x in zip(_rows(SIZES), noise, strict=True)]
    fitted = StepTime.fit(rows)
    assert fitted.seconds(32, 4) == pytest.approx(TRUE.seconds(32, 4), rel=0.02)


def test_no_coefficient_is_negative() -> None:
    assert StepTime.fit([(1, 1, 3.0, 1), (2, 1, 2.0, 1), (4, 1, 1.0, 1)])[2] == 0


def test_errors_count_relative_to_the_time_and_by_weight() -> None:
    two_times = [(8, 1, 1.0, 1.0), (8, 1, 3.0, 1.0)]
    assert StepTime.fit(two_times).seconds(8, 1) == pytest.approx((1 + 1 / 3) / (1 + 1 / 9))
    heavy = [(8, 1, 1.0, 1e6), (8, 1, 3.0, 1.0)]
    assert StepTime.fit(heavy).seconds(8, 1) == pytest.approx(1, abs=1e-5)


def test_of_one_size_a_larger_micro_batch_is_hoped_to_cost_nothing() -> None:
    fitted = StepTime.fit(_rows([(16, 2), (16, 2)]))
    assert fitted == pytest.approx((0, TRUE.seconds(16, 2) / 2, 0))
    assert fitted.seconds(512, 2) == pytest.approx(TRUE.seconds(16, 2))


def test_of_one_micro_batch_the_same_is_hoped_and_accumulation_is_known() -> None:
    fitted = StepTime.fit(_rows([(16, 1), (16, 2), (16, 8)]))
    assert fitted == pytest.approx((0.05, 0.01 + 16 * 0.002, 0))


def test_of_one_accumulation_what_a_step_has_anyway_goes_to_the_passes() -> None:
    fitted = StepTime.fit(_rows([(1, 2), (4, 2), (16, 2)]))
    assert fitted == pytest.approx((0, 0.01 + 0.05 / 2, 0.002))


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("column", range(4))
def test_a_row_holds_numbers_above_0(wrong: float, column: int) -> None:
    row = [8, 2, 0.1, 5]
    row[column] = wrong
    with pytest.raises(
        ValueError, match=("micro_batch", "accumulate", "seconds", "weight")[column]
    ):
        StepTime.fit([row])


def test_a_fit_needs_a_row() -> None:
    with pytest.raises(ValueError, match="no rows"):
        StepTime.fit([])


def test_the_best_batch_is_that_of_the_equation_to_the_grid() -> None:
    # B/(c + B) · 1/(φ + B), steps of 0.1 + 0.001·B, is largest at √(c·φ) with c = 100.
    answer = _propose(GoodputRule())
    assert answer.target_batch == pytest.approx(math.sqrt(100 * 512), rel=2**0.125 - 1)


def test_the_efficiency_is_that_of_the_noise_scale() -> None:
    # Goodput times seconds is samples of the reference batch: E_min(1 + B/B_noise) per sample.
    worth = [1 / batch_efficiency(batch, 512).samples_over_min for batch in (64, 256)]
    answer = _propose(GoodputRule(), max_global_batch=256, step_seconds=lambda batch: 1.0)
    assert answer.statistic == pytest.approx(256 * worth[1] / (64 * worth[0]) - 1)


def test_equal_seconds_ask_for_the_largest_batch_and_equal_throughput_for_none() -> None:
    assert _propose(GoodputRule(), step_seconds=lambda batch: 1.0).target_batch == 4096
    assert _propose(GoodputRule(), step_seconds=lambda batch: 0.01 * batch).target_batch == 64


def test_a_gain_that_is_too_small_leaves_the_batch() -> None:
    gain = _propose(GoodputRule(0.0)).statistic
    assert gain > 0
    assert _propose(GoodputRule(0.99 * gain)).target_batch > 64
    answer = _propose(GoodputRule(1.01 * gain))
    assert (answer.target_batch, answer.statistic) == (64, gain)


def test_batches_below_the_reference_are_no_choice() -> None:
    answer = _propose(GoodputRule(), global_batch=256, step_seconds=lambda batch: 1.0 * batch)
    assert answer.target_batch == 64


def test_a_noise_scale_without_an_upper_limit_counts_as_its_lower_one() -> None:
    small = _propose(GoodputRule(), noise=NOISE._replace(low=64.0, high=math.inf))
    assert small == _propose(GoodputRule(), noise=NOISE._replace(value=64.0))


def test_a_time_that_means_nothing_is_not_chosen() -> None:
    seconds = {64: 0.1, 128: math.nan, 256: 0.0}
    answer = _propose(
        GoodputRule(), max_global_batch=256, step_seconds=lambda batch: seconds.get(batch, -1.0)
    )
    assert answer.target_batch == 64


@pytest.mark.parametrize("name", ["reference_batch", "max_global_batch"])
def test_without_limits_there_is_no_choice(name: str) -> None:
    assert GoodputRule().propose(replace(SEEN, **{name: None})) is None


def test_the_gain_is_at_least_0() -> None:
    with pytest.raises(ValueError, match="min_gain"):
        GoodputRule(-0.1)
