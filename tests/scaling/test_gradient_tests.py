"""Norm test, inner-product test, orthogonality, and the test per coordinate."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_ext.scaling import (
    COORDINATE_FRACTIONS,
    AugmentedTest,
    CoordinateTest,
    InnerProducts,
    InnerProductTest,
    NormTest,
    Observation,
    noise_scale,
)

NOISE = noise_scale([(1.0, 500.0, 64), (1.0, 524.0, 64)] * 20)
SEEN = Observation(64, NOISE.samples, NOISE)


def _propose(rule, observation: Observation):
    answer = rule.propose(observation)
    assert answer is not None
    return answer


def _one_batch(gradients: np.ndarray) -> InnerProducts:
    mean = gradients.mean(0)
    sq_norm = mean @ mean
    trace = gradients.var(0, ddof=1).sum()
    along = (gradients @ mean).var(ddof=1)
    return InnerProducts(*map(float, (along, sq_norm, sq_norm**2, trace)))


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
def test_the_batch_that_the_norm_test_asks_for_just_passes_it(eta: float) -> None:
    target = _propose(NormTest(eta), SEEN).target_batch
    assert NOISE.grad_trace / target == pytest.approx(eta**2 * NOISE.grad_sq_norm)
    again = _propose(NormTest(eta), replace(SEEN, global_batch=round(target)))
    assert again.statistic == pytest.approx(eta**2, rel=0.01)


@pytest.mark.parametrize("changes", [{"grad_trace": -1.0}, {"grad_sq_norm": -9.0}], ids=str)
def test_the_plug_in_test_has_no_opinion_without_a_positive_ratio(changes) -> None:
    seen = replace(SEEN, noise=NOISE._replace(**changes))
    assert NormTest(plug_in=True).propose(seen) is None


def test_the_inner_product_test_compares_the_spread_along_the_gradient_with_its_square() -> None:
    lie = _one_batch(np.random.default_rng(0).standard_normal((64, 5)) + 0.3)
    answer = _propose(InnerProductTest(0.5), replace(SEEN, inner_products=lie))
    assert answer.target_batch == pytest.approx(lie.variance / (0.25 * lie.batch_sq_norm**2))
    assert answer.statistic == pytest.approx(answer.target_batch / 64)


def test_the_orthogonality_test_looks_at_what_is_left_across_the_gradient() -> None:
    gradients = np.random.default_rng(0).standard_normal((64, 5)) + 0.3
    mean = gradients.mean(0)
    across = gradients - np.outer(gradients @ mean, mean) / (mean @ mean)
    expected = across.var(0, ddof=1).sum() / (0.25 * mean @ mean)
    seen = replace(SEEN, inner_products=_one_batch(gradients))
    answer = _propose(AugmentedTest(theta=100.0, nu=0.5), seen)
    assert answer.target_batch == pytest.approx(expected)
    assert answer.reason.startswith("orthogonality test")


def test_the_augmented_test_asks_for_the_larger_of_both() -> None:
    gradients = np.random.default_rng(0).standard_normal((64, 5)) + 0.3
    seen = replace(SEEN, inner_products=_one_batch(gradients))
    along = _propose(InnerProductTest(0.5), seen).target_batch
    assert _propose(AugmentedTest(0.5, nu=100.0), seen).target_batch == along
    assert _propose(AugmentedTest(0.5, nu=0.1), seen).target_batch > along


def test_the_published_bounds_are_the_defaults() -> None:
    assert AugmentedTest() == AugmentedTest(theta=InnerProductTest().theta, nu=5.84)
    assert InnerProductTest() == InnerProductTest(0.9)


@pytest.mark.parametrize("fraction", COORDINATE_FRACTIONS)
def test_the_coordinate_test_passes_for_its_fraction_of_the_coordinates(fraction: float) -> None:
    rng = np.random.default_rng(0)
    mean, variance = rng.standard_normal(1000), rng.exponential(size=1000)
    ratios = np.sort(variance / mean**2)
    measured = {f: float(ratios[math.ceil(f * 1000) - 1]) for f in COORDINATE_FRACTIONS}
    rule = CoordinateTest(0.5, fraction)
    target = _propose(rule, replace(SEEN, coordinates=measured)).target_batch
    passing = variance / target <= 0.25 * mean**2 * (1 + 1e-12)
    assert passing.mean() == fraction


def test_a_coordinate_without_gradient_asks_for_everything() -> None:
    seen = replace(SEEN, coordinates={1.0: math.inf})
    assert _propose(CoordinateTest(), seen).target_batch == math.inf


def test_a_fraction_that_is_not_measured_has_no_opinion_or_is_refused() -> None:
    assert CoordinateTest(fraction=0.5).propose(replace(SEEN, coordinates={1.0: 8.0})) is None
    with pytest.raises(ValueError, match=r"choose one of \(0.5, 0.9, 0.99, 1.0\)"):
        CoordinateTest(fraction=0.75)


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
def test_a_bound_must_be_finite_and_above_0(wrong: float) -> None:
    for name, kind in {"eta": NormTest, "theta": InnerProductTest}.items():
        with pytest.raises(ValueError, match=name):
            kind(wrong)
    with pytest.raises(ValueError, match="theta"):
        AugmentedTest(theta=wrong)
    with pytest.raises(ValueError, match="nu"):
        AugmentedTest(nu=wrong)
    with pytest.raises(ValueError, match="eta"):
        CoordinateTest(wrong)
