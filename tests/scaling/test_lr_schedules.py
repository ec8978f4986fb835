"""Learning-rate factors by samples: shapes, ends, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest

from lightning_ext.scaling import (
    cosine_factor,
    linear_factor,
    one_cycle_factor,
    one_cycle_momentum,
    power_lr,
    regime_adaptation,
    warmup_factor,
    wsd_factor,
)

Factor = Callable[..., float]
RUN = {"total_samples": 1000, "warmup_samples": 200}
WHOLE: dict[str, Callable[[float], float]] = {
    "cosine": lambda n: cosine_factor(n, final=0.1, start=0.2, **RUN),
    "linear": lambda n: linear_factor(n, final=0.1, start=0.2, **RUN),
    "wsd": lambda n: wsd_factor(n, decay_samples=300, final=0.1, start=0.2, **RUN),
    "wsd sqrt": lambda n: wsd_factor(
        n, decay_samples=300, final=0.1, start=0.2, shape="sqrt", **RUN
    ),
    "one cycle": lambda n: one_cycle_factor(
        n, total_samples=1000, peak_at=0.2, start=0.2, final=0.1
    ),
}
every_curve = pytest.mark.parametrize("name", WHOLE)


@every_curve
def test_it_goes_from_start_over_1_to_final_and_stays(name: str) -> None:
    curve = WHOLE[name]
    assert [curve(0), curve(200)] == [pytest.approx(0.2), 1.0]
    assert [curve(1000), curve(1001), curve(10**12)] == [pytest.approx(0.1)] * 3


@every_curve
def test_it_rises_then_never_rises_again(name: str) -> None:
    values = [WHOLE[name](n) for n in range(0, 1001, 10)]
    assert values[:21] == sorted(values[:21])
    assert values[20:] == sorted(values[20:], reverse=True)


@every_curve
def test_it_has_no_jump(name: str) -> None:
    values = [WHOLE[name](n / 10) for n in range(10_001)]
    largest = max(abs(b - a) for a, b in pairwise(values))
    assert largest < (0.9 * math.sqrt(1 / 3000) if name == "wsd sqrt" else 1e-3) + 1e-12


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "wsd sqrt"])
def test_the_warm_up_is_the_same_line_in_all_of_them(name: str) -> None:
    for samples in range(0, 200, 7):
        assert WHOLE[name](samples) == warmup_factor(samples, warmup_samples=200, start=0.2)


def test_a_cosine_without_warm_up_begins_at_the_peak() -> None:
    assert cosine_factor(0, total_samples=10) == 1.0


def test_the_constant_phase_is_constant() -> None:
    assert {WHOLE["wsd"](n) for n in range(200, 701)} == {1.0}


def test_the_cooldowns_are_a_line_and_one_minus_the_root() -> None:
    def cooldown(samples: float, shape: str) -> float:
        return wsd_factor(
            samples, total_samples=100, warmup_samples=0, decay_samples=100, shape=shape
        )

    for samples in range(101):
        assert cooldown(samples, "linear") == 1 - samples / 100
        assert cooldown(samples, "sqrt") == 1 - math.sqrt(samples / 100)


def test_the_momentum_is_lowest_where_the_rate_is_highest() -> None:
    run = {"total_samples": 1000, "peak_at": 0.4}
    rates = [one_cycle_factor(n, **run) for n in range(0, 1001, 5)]
    momenta = [one_cycle_momentum(n, **run) for n in range(0, 1001, 5)]
    assert rates.index(max(rates)) == momenta.index(min(momenta)) == 80
    assert (momenta[0], momenta[80], momenta[-1]) == (0.95, 0.85, 0.95)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warmup_factor(-1, warmup_samples=10), "samples=-1"),
        (lambda: warmup_factor(math.nan, warmup_samples=10), "samples=nan"),
        (lambda: warmup_factor(1, warmup_samples=-10), "warmup_samples=-10"),
        (lambda: warmup_factor(1, warmup_samples=10, start=1.5), "start=1.5"),
        (lambda: cosine_factor(1, total_samples=0), "total_samples=0"),
        (lambda: cosine_factor(1, total_samples=-5), "total_samples=-5"),
        (lambda: cosine_factor(1, total_samples=10, warmup_samples=11), "do not fit in total"),
        (lambda: linear_factor(1, total_samples=10, warmup_samples=11), "do not fit in total"),
        (lambda: linear_factor(1, total_samples=10, final=1.1), "final=1.1"),
        (
            lambda: wsd_factor(1, total_samples=10, warmup_samples=6, decay_samples=5),
            "warmup_samples=6 and decay_samples=5 do not fit",
        ),
        (
            lambda: wsd_factor(1, total_samples=10, warmup_samples=6, decay_samples=-5),
            "decay_samples=-5",
        ),
        (
            lambda: wsd_factor(1, total_samples=9, warmup_samples=1, decay_samples=1, shape="cos"),
            "shape='cos' is not known; choose one of",
        ),
        (lambda: one_cycle_factor(1, total_samples=10, peak_at=0.0), "both legs have a length"),
        (lambda: one_cycle_factor(1, total_samples=10, peak_at=1), "both legs have a length"),
        (lambda: one_cycle_factor(1, total_samples=10, final=-0.1), "final=-0.1"),
        (lambda: one_cycle_momentum(1, total_samples=9, low=0.9, high=0.8), "is above high=0.8"),
        (lambda: power_lr(1, global_batch=0), "global_batch=0"),
        (lambda: power_lr(1, global_batch=1, b=0.5), "b=0.5"),
        (lambda: power_lr(1, global_batch=1, decay_tokens=5), "needs total_tokens"),
        (
            lambda: power_lr(1, global_batch=1, warmup_tokens=5, total_tokens=9, decay_tokens=5),
            "warmup_tokens=5 and decay_tokens=5 do not fit",
        ),
        (lambda: regime_adaptation([0], global_batch=2, reference_batch=1), "length=0"),
    ],
)
def test_a_value_out_of_range_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrong", ["100", None, True])
def test_a_length_that_is_no_number_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="total_samples must be a number"):
        cosine_factor(1, total_samples=wrong)


def test_the_power_law_is_bounded_at_no_tokens() -> None:
    assert power_lr(0, global_batch=1024) == 0.02
    assert power_lr(1, global_batch=1024) == 0.02


def test_the_power_law_at_128_sequences_is_near_the_best_rates_found() -> None:
    # Shen et al. 2024, section 3.1: 0.0128 for 2e9 tokens, 0.0008 for 256e9, in factors of two.
    for tokens, best in ((2e9, 0.0128), (256e9, 0.0008)):
        assert abs(math.log2(power_lr(tokens, global_batch=128, a=4.6) / best)) < 0.5


def test_the_power_law_counts_sequences_not_tokens() -> None:
    one = power_lr(1e12, global_batch=1)
    assert power_lr(1e12, global_batch=64) == pytest.approx(64 * one)
    assert 64 * 4096 * one > 0.5  # in tokens it would be no learning rate


def test_the_power_law_is_held_during_warm_up_and_decay() -> None:
    phases = {"warmup_tokens": 1e9, "total_tokens": 9e9, "decay_tokens": 2e9}
    begin, end = (power_lr(n, global_batch=8) for n in (1e9, 7e9))
    assert power_lr(0.5e9, global_batch=8, **phases) == pytest.approx(begin / 2)
    assert power_lr(8e9, global_batch=8, **phases) == pytest.approx(end / 2)
    assert power_lr(8e9, global_batch=8, **phases, final=0.5) == pytest.approx(0.75 * end)
    assert power_lr(3e9, global_batch=8, **phases) == power_lr(3e9, global_batch=8)


def test_the_power_law_without_an_end_never_decays() -> None:
    assert power_lr(1e15, global_batch=8, warmup_tokens=1e9) == power_lr(1e15, global_batch=8)


def test_lengths_are_stretched_by_whole_factors() -> None:
    assert regime_adaptation([30, 60], global_batch=300, reference_batch=128) == (90, 180)
    assert regime_adaptation([30, 60], global_batch=64, reference_batch=128) == (30, 60)
    updates = 30 * 50_000 // 128
    (epochs,) = regime_adaptation([30], global_batch=1024, reference_batch=128)
    assert epochs * 50_000 // 1024 == updates
