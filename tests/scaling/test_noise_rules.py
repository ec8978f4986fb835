"""Rules that read the noise scale."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lightning_ext.scaling import (
    DiversityRule,
    GSNRRule,
    NoiseScaleRule,
    NormTest,
    Observation,
    OptimalBatchRule,
    SimilarityRule,
    batch_efficiency,
    noise_scale,
    supported_noise_scale,
)

NOISE = noise_scale([(1.0, 500.0, 64), (1.0, 524.0, 64)] * 20)
SEEN = Observation(64, NOISE.samples, NOISE)
RULES = [
    NoiseScaleRule(),
    OptimalBatchRule(100.0),
    NormTest(),
    SimilarityRule(),
    DiversityRule(),
    GSNRRule(),
]
rules = pytest.mark.parametrize("rule", RULES, ids=repr)


def _observe(**changes: float) -> Observation:
    return replace(SEEN, noise=NOISE._replace(**changes))


def _target(rule, observation: Observation = SEEN) -> float:
    answer = rule.propose(observation)
    assert answer is not None
    return answer.target_batch


@rules
@pytest.mark.parametrize("value", [math.inf, 1e6, 600.0])
def test_an_estimate_without_an_upper_limit_counts_as_its_lower_one(rule, value) -> None:
    noise = {"value": value, "low": 512.0, "high": math.inf}
    assert _target(rule, _observe(**noise)) == _target(rule)


@rules
def test_there_is_no_opinion_where_nothing_is_known(rule) -> None:
    assert rule.propose(_observe(value=math.inf, low=0.0, high=math.inf)) is None


def test_a_decision_rests_on_the_value_or_the_lower_limit_or_nothing() -> None:
    assert supported_noise_scale(None) is None
    assert supported_noise_scale(NOISE) == 512
    assert supported_noise_scale(NOISE._replace(low=7.0, high=math.inf)) == 7
    assert supported_noise_scale(NOISE._replace(value=math.nan)) is None


@rules
def test_the_reason_tells_the_estimate_with_its_interval(rule) -> None:
    answer = rule.propose(SEEN)
    assert answer is not None
    interval = f"noise scale 512 ({NOISE.low:.4g} to {NOISE.high:.4g}) from 2560 samples"
    assert interval in answer.reason


def test_the_factor_multiplies_the_noise_scale() -> None:
    assert _target(NoiseScaleRule(0.25)) == 128


@pytest.mark.parametrize(("batch", "target"), [(255, 1024.0), (256, 1024.0), (257, 257.0)])
def test_below_the_threshold_the_present_batch_stays(batch: int, target: float) -> None:
    rule = NoiseScaleRule(factor=2.0, threshold=2.0)
    assert _target(rule, replace(SEEN, global_batch=batch)) == target


def test_without_a_threshold_the_batch_also_shrinks() -> None:
    assert _target(NoiseScaleRule(), replace(SEEN, global_batch=4096)) == 512


@pytest.mark.parametrize("price", [0.5, 64.0, 512.0, 1e5])
def test_the_optimal_batch_is_the_cheapest_mix_of_steps_and_samples(price: float) -> None:
    def cost(log_batch: float) -> float:  # least steps 1, hence least samples B_noise
        steps, samples = batch_efficiency(math.exp(log_batch), 512.0)
        return 512.0 * samples + price * steps

    best = minimize_scalar(cost, bounds=(-5, 20), method="bounded", options={"xatol": 1e-9})
    assert _target(OptimalBatchRule(price)) == pytest.approx(math.exp(best.x), rel=1e-5)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_at_the_fixed_point_the_similarity_is_the_target(target: float) -> None:
    batch = _target(SimilarityRule(target))
    again = SimilarityRule(target).propose(replace(SEEN, global_batch=batch))
    assert again is not None
    assert again.statistic == pytest.approx(target)
    assert again.target_batch == pytest.approx(batch)


@pytest.mark.parametrize(("batch", "target"), [(100, 110.0), (1024, 1024.0), (2000, 1800.0)])
def test_the_published_walk_goes_a_tenth_up_or_down(batch: int, target: float) -> None:
    rule = SimilarityRule(target=0.5, step=0.1)
    assert _target(rule, replace(SEEN, global_batch=batch)) == pytest.approx(target)


def test_the_statistic_is_the_cosine_of_the_gradients_of_two_halves() -> None:
    rng, dim, batch, repeats = np.random.default_rng(0), 10_000, 64, 400
    mean = np.full(dim, dim**-0.5)
    noise = math.sqrt(2 * 512 / (batch * dim)) * rng.standard_normal((repeats, 2, dim))
    halves = mean + noise
    norms = np.linalg.norm(halves, axis=-1).prod(-1)
    cosines = (halves[:, 0] * halves[:, 1]).sum(-1) / norms
    answer = SimilarityRule().propose(SEEN)
    assert answer is not None
    assert abs(cosines.mean() - answer.statistic) < 4 * cosines.std() / math.sqrt(repeats)


def test_the_bound_of_diversity_is_one_more_than_the_noise_scale() -> None:
    gradients = np.random.default_rng(0).standard_normal((50, 7)) + 1
    total = gradients.sum(0)
    bound = 50 * (gradients**2).sum() / (total @ total)
    mean = gradients.mean(0)
    size = gradients.var(0).sum() / (mean @ mean)
    assert 1 + size == pytest.approx(bound)
    assert _target(DiversityRule(), _observe(value=size)) == pytest.approx(bound)


@pytest.mark.parametrize("gsnr", [0.5, 1.0, 4.0])
def test_the_ratio_of_the_proposed_batch_is_the_one_to_hold(gsnr: float) -> None:
    again = GSNRRule(gsnr).propose(replace(SEEN, global_batch=round(_target(GSNRRule(gsnr)))))
    assert again is not None
    assert again.statistic == pytest.approx(gsnr)


def test_three_rules_are_one_number_read_with_other_thresholds() -> None:
    targets = [_target(rule) for rule in (NoiseScaleRule(4.0), NormTest(0.5), GSNRRule(4.0))]
    assert targets == pytest.approx([2048.0] * 3)


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
def test_a_parameter_must_be_finite_and_above_0(wrong: float) -> None:
    for name, kind in {
        "factor": NoiseScaleRule,
        "step_price": OptimalBatchRule,
        "gsnr": GSNRRule,
    }.items():
        with pytest.raises(ValueError, match=name):
            kind(wrong)
    with pytest.raises(ValueError, match="factor"):
        DiversityRule(wrong)


@pytest.mark.parametrize("wrong", [0, 1, -0.5, math.nan])
def test_a_cosine_and_a_step_lie_between_0_and_1(wrong: float) -> None:
    with pytest.raises(ValueError, match="target"):
        SimilarityRule(wrong)
    with pytest.raises(ValueError, match="step"):
        SimilarityRule(step=wrong)


def test_a_threshold_is_at_least_0() -> None:
    with pytest.raises(ValueError, match="threshold"):
        NoiseScaleRule(threshold=-1.0)
