"""Decay of a moving average: limits and refusals."""

from __future__ import annotations

import math

import pytest

from lightning_ext.scaling import decay_to_half_life, ema_decay, ema_warmup, half_life_to_decay


@pytest.mark.parametrize("kappa", [0.5, 1, 3])
def test_no_memory_and_full_memory_stay(kappa: float) -> None:
    assert (ema_decay(0.0, kappa), ema_decay(1.0, kappa)) == (0.0, 1.0)


def test_steps_of_changing_size_decay_by_their_samples() -> None:
    decays = [ema_decay(0.99, batch / 256) for batch in (128, 256, 640)]
    assert math.prod(decays) == pytest.approx(0.99**4)


def test_an_average_that_never_moves_has_no_half_life() -> None:
    assert half_life_to_decay(math.inf, 64) == 1.0
    assert decay_to_half_life(1.0, 64) == math.inf
    assert decay_to_half_life(0.0, 64) == 0.0


@pytest.mark.parametrize("half_life", [1.0, 1e3, 1e9])
def test_half_life_and_decay_are_inverse(half_life: float) -> None:
    decay = half_life_to_decay(half_life, 32)
    assert decay_to_half_life(decay, 32) == pytest.approx(half_life, rel=1e-8)


def test_warmup_never_exceeds_the_decay() -> None:
    assert [ema_warmup(0.5, t) for t in (0, 8, 9)] == [0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ema_decay(1.5, 2), "decay"),
        (lambda: ema_decay(math.nan, 2), "decay"),
        (lambda: ema_decay(0.9, 0), "kappa"),
        (lambda: half_life_to_decay(0, 64), "half_life_samples"),
        (lambda: half_life_to_decay(math.nan, 64), "half_life_samples"),
        (lambda: half_life_to_decay(64, 0), "global_batch"),
        (lambda: decay_to_half_life(-0.1, 64), "decay"),
        (lambda: ema_warmup(0.9, -1), "reference_steps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(call, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()


def test_a_string_is_not_a_decay() -> None:
    with pytest.raises(TypeError, match="decay must be a number"):
        ema_decay("0.9", 2)
