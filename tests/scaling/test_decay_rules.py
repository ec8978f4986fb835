"""Rules of the position in the run and of the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_ext.scaling import (
    ESTIMATED_FIELDS,
    GeoDamp,
    Observation,
    PadaDamp,
    Seesaw,
    scale_hyperparameters,
)

SEEN = Observation(64, 0, reference_batch=32, lr_decay=1.0)


def _target(rule, **changes) -> float:
    answer = rule.propose(replace(SEEN, **changes))
    assert answer is not None
    return answer.target_batch


@pytest.mark.parametrize("rule", [PadaDamp(1.0), GeoDamp(2.0, 100), Seesaw()], ids=repr)
def test_nothing_is_estimated_so_that_the_rule_is_followed_to_the_letter(rule) -> None:
    assert not rule.needs & ESTIMATED_FIELDS
    assert _target(rule) == 32


@pytest.mark.parametrize(("samples", "target"), [(0, 32), (1, 33), (640, 37), (641, 38)])
def test_padadamp_counts_steps_of_the_reference_batch(samples: int, target: int) -> None:
    assert _target(PadaDamp(0.25), samples_seen=samples) == target
    assert _target(PadaDamp(0.25), samples_seen=samples, global_batch=4096) == target


@pytest.mark.parametrize(("samples", "target"), [(99, 32), (100, 96), (199, 96), (200, 288)])
def test_geodamp_grows_by_a_factor_at_equal_intervals(samples: int, target: int) -> None:
    assert _target(GeoDamp(3.0, 100), samples_seen=samples) == target


def test_a_batch_that_is_no_float_any_more_is_infinite() -> None:
    assert _target(GeoDamp(2.0, 1), samples_seen=10**6) == math.inf


@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0, 3.0, 10.0])
def test_seesaw_grows_at_exact_powers_of_the_factor_and_not_before(factor: float) -> None:
    for cuts in range(12):
        at = factor**-cuts
        assert _target(Seesaw(factor), lr_decay=at) == 32 * factor**cuts
        assert _target(Seesaw(factor), lr_decay=0.999 * at) == 32 * factor**cuts
        if cuts:
            assert _target(Seesaw(factor), lr_decay=1.001 * at) == 32 * factor ** (cuts - 1)


def test_seesaw_stays_while_the_learning_rate_is_at_its_largest() -> None:
    assert [_target(Seesaw(), lr_decay=x) for x in (1.0, 1 + 1e-15, 0.501)] == [32] * 3


@pytest.mark.parametrize("cut", [0.5, 0.25, 2**-7])
def test_with_sqrt_a_cut_by_alpha_leaves_the_root_of_alpha_and_with_linear_all(cut) -> None:
    kappa = _target(Seesaw(), lr_decay=cut) / 32
    scheduled = 0.1 * cut
    seesaw = scale_hyperparameters(kappa, rule=Seesaw.lr_rule, lr=scheduled, betas=(0.9, 0.95))
    assert seesaw.lr == pytest.approx(0.1 * math.sqrt(cut))
    assert seesaw.betas == (0.9, 0.95)
    assert kappa == 1 / cut
    smith = scale_hyperparameters(kappa, rule="linear", lr=scheduled)
    assert smith.lr == pytest.approx(0.1)


def test_seesaw_takes_the_steps_that_its_integral_says() -> None:
    # Half a cosine by samples, at fine steps of the batch: ∫ cos over [0, π/2] is 2/π = 0.637 of
    # the steps at a constant batch, the published "about 36 % fewer".
    total, samples, steps = 10**7, 0, 0
    while samples < total:
        decay = math.cos(math.pi / 2 * samples / total)
        samples += round(_target(Seesaw(1.01), lr_decay=decay))
        steps += 1
    assert steps / (total / 32) == pytest.approx(2 / math.pi, rel=0.01)


@pytest.mark.parametrize("wrong", [1.0, 0.5, math.nan, math.inf])
def test_a_factor_is_above_1(wrong: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        Seesaw(wrong)
    with pytest.raises(ValueError, match="factor"):
        GeoDamp(wrong, 100)


def test_rates_and_intervals_are_above_0() -> None:
    with pytest.raises(ValueError, match="rate"):
        PadaDamp(0.0)
    with pytest.raises(ValueError, match="every_samples"):
        GeoDamp(2.0, 0)
