"""Rules that read the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_ext.scaling import AdaDamp, CriticalBatchLaw, NoiseScale, Observation, RadaDamp

NOISE = NoiseScale(512.0, 400.0, 700.0, 0.25, 128.0, 6400)
SEEN = Observation(
    64,
    6400,
    NOISE,
    reference_batch=48,
    loss=2.0,
    first_loss=4.0,
    first_grad_sq_norm=1.0,
)


def _target(rule, **changes) -> float:
    answer = rule.propose(replace(SEEN, **changes))
    assert answer is not None
    return answer.target_batch


def test_the_critical_batch_is_a_power_of_the_loss() -> None:
    law = CriticalBatchLaw(tokens_per_sample=1.0)
    assert _target(law, loss=1.0) == 2e8
    assert _target(law, loss=3.0) == pytest.approx(2e8 * 3 ** (-1 / 0.21))


def test_it_doubles_for_about_13_percent_less_loss() -> None:
    law = CriticalBatchLaw(tokens_per_sample=1.0)
    ratio = _target(law, loss=3.0 * 0.87) / _target(law, loss=3.0)
    assert ratio == pytest.approx(1.94, abs=0.005)
    assert _target(law, loss=3.0 * 2**-0.21) / _target(law, loss=3.0) == pytest.approx(2)


def test_tokens_are_turned_into_samples() -> None:
    answer = CriticalBatchLaw(tokens_per_sample=512).propose(SEEN)
    assert answer is not None
    assert answer.target_batch * 512 == pytest.approx(answer.statistic)


def test_its_coefficients_are_those_of_the_own_fit() -> None:
    assert _target(CriticalBatchLaw(10.0, b_star=2.2e7, alpha=0.5)) == pytest.approx(2.2e6 / 4)


def test_adadamp_grows_with_what_is_left_of_the_loss_rounded_up() -> None:
    assert _target(AdaDamp()) == 96
    assert _target(AdaDamp(), loss=4.0) == 48
    assert _target(AdaDamp(), loss=3.0) == 64
    assert _target(AdaDamp(), loss=3.1) == math.ceil(48 * 4 / 3.1)


def test_adadamp_counts_the_loss_from_its_floor() -> None:
    assert _target(AdaDamp(loss_floor=1.0)) == 48 * 3
    assert _target(AdaDamp(loss_floor=-4.0)) == 64


@pytest.mark.parametrize("loss", [1.0, 0.5])
def test_adadamp_has_no_opinion_at_or_below_the_floor(loss: float) -> None:
    assert AdaDamp(loss_floor=1.0).propose(replace(SEEN, loss=loss)) is None


def test_radadamp_takes_the_mean_of_loss_and_gradient() -> None:
    assert _target(RadaDamp()) == pytest.approx(48 / (0.5 * (0.5 + 0.25)))
    unchanged = {"loss": 4.0, "noise": NOISE._replace(grad_sq_norm=1.0)}
    assert _target(RadaDamp(), **unchanged) == 48


@pytest.mark.parametrize("name", ["first_loss", "first_grad_sq_norm"])
@pytest.mark.parametrize("value", [None, 0.0, -1.0, math.nan])
def test_radadamp_wants_first_values_above_0(name: str, value: float | None) -> None:
    assert RadaDamp().propose(replace(SEEN, **{name: value})) is None


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf])
def test_a_coefficient_must_be_finite_and_above_0(wrong: float) -> None:
    for name in ("tokens_per_sample", "b_star", "alpha"):
        with pytest.raises(ValueError, match=name):
            CriticalBatchLaw(**{"tokens_per_sample": 1.0, name: wrong})


def test_a_floor_is_a_finite_number() -> None:
    with pytest.raises(ValueError, match="loss_floor"):
        AdaDamp(math.inf)
    with pytest.raises(TypeError, match="loss_floor"):
        AdaDamp("0")
