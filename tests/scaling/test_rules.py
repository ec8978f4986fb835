"""Rules that read the noise, and the reader of their names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_ext.scaling import (
    BatchSizeSchedule,
    NoiseScale,
    NoiseScaleRule,
    NormTest,
    Observation,
    noise_scale,
    parse_rule,
)

NOISE = noise_scale([(1.0, 500.0, 64), (1.0, 524.0, 64)] * 20)
SEEN = Observation(64, NOISE.samples, NOISE)
NOISY_RULES = [NoiseScaleRule(), NormTest(), NormTest(plug_in=True)]


def _observe(**changes: float) -> Observation:
    return replace(SEEN, noise=NOISE._replace(**changes))


def _target(rule, observation: Observation) -> float:
    answer = rule.propose(observation)
    assert answer is not None
    return answer.target_batch


@pytest.mark.parametrize("rule", NOISY_RULES, ids=repr)
def test_there_is_no_opinion_before_the_first_measurement(rule) -> None:
    assert rule.needs == {"noise"}
    assert rule.propose(replace(SEEN, noise=None)) is None


@pytest.mark.parametrize("rule", NOISY_RULES[:2], ids=repr)
@pytest.mark.parametrize("value", [math.nan, -5.0, 0.0])
def test_there_is_no_opinion_without_a_noise_scale_above_0(rule, value: float) -> None:
    assert rule.propose(_observe(value=value)) is None


@pytest.mark.parametrize("changes", [{"grad_trace": -1.0}, {"grad_sq_norm": -9.0}], ids=str)
def test_the_plug_in_test_has_no_opinion_without_a_positive_ratio(changes) -> None:
    assert NormTest(plug_in=True).propose(_observe(**changes)) is None


@pytest.mark.parametrize("rule", NOISY_RULES[:2], ids=repr)
@pytest.mark.parametrize("value", [math.inf, 1e6, 600.0])
def test_an_estimate_without_an_upper_limit_counts_as_its_lower_one(rule, value) -> None:
    noise = {"value": value, "low": 512.0, "high": math.inf}
    assert _target(rule, _observe(**noise)) == _target(rule, SEEN)


@pytest.mark.parametrize("rule", NOISY_RULES[:2], ids=repr)
def test_there_is_no_opinion_where_nothing_is_known(rule) -> None:
    assert rule.propose(_observe(value=math.inf, low=0.0, high=math.inf)) is None


def test_the_factor_multiplies_the_noise_scale() -> None:
    assert _target(NoiseScaleRule(0.25), SEEN) == 128


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
def test_the_batch_that_the_norm_test_asks_for_just_passes_it(eta: float) -> None:
    target = _target(NormTest(eta), SEEN)
    assert NOISE.grad_trace / target == pytest.approx(eta**2 * NOISE.grad_sq_norm)
    again = NormTest(eta).propose(replace(SEEN, global_batch=round(target)))
    assert again is not None
    assert again.statistic == pytest.approx(eta**2, rel=0.01)


@pytest.mark.parametrize("scale", [64, 512, 4096, 10**9])
def test_the_plug_in_target_saturates_where_the_unbiased_one_follows(scale: int) -> None:
    noise = NoiseScale(scale, scale, scale, 1.0, scale, 64)
    seen = Observation(64, 64, noise)
    assert _target(NormTest(1.0, plug_in=True), seen) == pytest.approx(64 * scale / (64 + scale))
    assert _target(NormTest(1.0, plug_in=True), seen) <= 64
    assert _target(NormTest(1.0), seen) == scale


def test_the_reason_tells_the_estimate_with_its_interval() -> None:
    answer = NoiseScaleRule().propose(SEEN)
    assert answer is not None
    assert answer.reason == (
        f"noise scale 512 ({NOISE.low:.4g} to {NOISE.high:.4g}) from 2560 samples"
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("noise_scale", NoiseScaleRule()),
        ("norm_test", NormTest()),
        ("0:64 1Mtok:128", BatchSizeSchedule((0, 10**6), (64, 128), "tokens")),
    ],
)
def test_a_name_is_read(name: str, rule) -> None:
    assert parse_rule(name) == rule


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'noise_scale', 'norm_test' or a schedule"):
        parse_rule("gns")


@pytest.mark.parametrize(
    "wrong", [None, 256, NoiseScaleRule, object()], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_not_a_rule_is_refused(wrong) -> None:
    with pytest.raises(TypeError, match="a rule must be"):
        parse_rule(wrong)


def test_anything_with_the_two_members_is_a_rule() -> None:
    class Constant:
        needs = frozenset()

        def propose(self, observation: Observation) -> None:
            return None

    rule = Constant()
    assert parse_rule(rule) is rule


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
def test_a_parameter_must_be_finite_and_above_0(wrong: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        NoiseScaleRule(wrong)
    with pytest.raises(ValueError, match="eta"):
        NormTest(wrong)
