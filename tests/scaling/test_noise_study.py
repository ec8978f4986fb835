"""Gaussian study: per-sample gradients N(G, S/d·I) with |G|² = 1, 64 samples in 8 parts of 8.

The statistics are drawn from their joint law instead of the gradients: with n samples in k parts
of equal size, Σ n_j|g_j|² − n|ḡ|² is (S/d)·χ² with (k − 1)d degrees of freedom, and |ḡ|²,
independent of it, (S/(nd))·χ² with d degrees and the noncentrality n·d·|G|²/S.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from lightning_ext.scaling import noise_scale, noise_statistics

PARTS, PART = 8, 8
SAMPLES = PARTS * PART
TRUE = [64, 512, 4096]
ROWS = 2000


def _sums_of_squares(rng, true, dim, shape):
    """Draw (Σ n_j|g_j|² − n|ḡ|², |ḡ|²) from the joint law."""
    between = true / dim * rng.chisquare((PARTS - 1) * dim, shape)
    noncentrality = SAMPLES * dim / true
    whole = true / (SAMPLES * dim) * rng.noncentral_chisquare(dim, noncentrality, shape)
    return between, whole


def _measure(rng, true, dim, shape):
    """Draw measurements and return them as rows (|G|², S, samples) along the last axis."""
    between, whole = _sums_of_squares(rng, true, dim, shape)
    # The statistics use only Σ n_j|g_j|², so each part may be given its mean.
    part = (between + SAMPLES * whole) / SAMPLES
    grad_sq_norm, grad_trace = noise_statistics([part] * PARTS, [PART] * PARTS, whole)
    return np.stack([grad_sq_norm, grad_trace, np.full(shape, float(SAMPLES))], axis=-1)


def _histories(seed: int, true: float, dim: int, repeats: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, true, dim])
    for _ in range(repeats):
        yield _measure(rng, true, dim, ROWS)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the two-sample Kolmogorov–Smirnov statistic times √(n/2), 1.95 at p = 0.001."""
    both = np.concatenate([a, b])
    ranks = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b)]
    return np.abs(ranks[0] - ranks[1]).max() * math.sqrt(len(a) / 2)


@pytest.mark.parametrize("true", [4, 64, 512])
@pytest.mark.parametrize("dim", [1, 5])
def test_the_joint_law_is_that_of_explicit_gradients(true: float, dim: int) -> None:
    rng, repeats = np.random.default_rng([true, dim]), 10_000
    mean = np.full(dim, 1 / math.sqrt(dim))
    gradients = mean + math.sqrt(true / dim) * rng.standard_normal((repeats, SAMPLES, dim))
    parts = gradients.reshape(repeats, PARTS, PART, dim).mean(axis=2)
    whole = (gradients.mean(axis=1) ** 2).sum(axis=1)
    between = PART * (parts**2).sum(axis=(1, 2)) - SAMPLES * whole
    law = _sums_of_squares(rng, true, dim, repeats)
    assert _distance(between, law[0]) < 1.95
    assert _distance(whole, law[1]) < 1.95
    # One product of both carries their dependence.
    assert _distance(between * whole, law[0] * law[1]) < 1.95


@pytest.mark.parametrize("true", TRUE)
def test_the_estimate_is_within_5_percent_after_2000_measurements(true: float) -> None:
    estimates = [noise_scale(rows).value for rows in _histories(0, true, 10**5, 20)]
    assert max(abs(x / true - 1) for x in estimates) < 0.05


@pytest.mark.parametrize("true", TRUE)
@pytest.mark.parametrize("dim", [10**3, 10**5])
def test_the_interval_holds_the_truth_in_95_of_100_runs(true: float, dim: int) -> None:
    assert 0.93 <= _coverage(1, true, dim, repeats=1000) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("true", TRUE)
@pytest.mark.parametrize("dim", [10**3, 10**5])
def test_the_interval_holds_it_in_95_of_100_of_very_many_runs(true: float, dim: int) -> None:
    assert 0.94 <= _coverage(4, true, dim, repeats=20_000) <= 0.96


def _coverage(seed: int, true: float, dim: int, repeats: int) -> float:
    estimates = [noise_scale(rows) for rows in _histories(seed, true, dim, repeats)]
    coverage = np.mean([x.low <= true <= x.high for x in estimates])
    ratios = np.array([x.value / true for x in estimates])
    error = math.sqrt(np.mean((ratios - 1) ** 2))
    print(f"{true=} {dim=} {coverage=:.3f} mean={ratios.mean():.4f} {error=:.4f}")
    return float(coverage)


def test_coverage_holds_where_successive_measurements_are_correlated() -> None:
    rng, repeats, memory = np.random.default_rng(0), 400, 0.6
    noise = rng.standard_normal((repeats, ROWS + 100, 2))
    for row in range(1, noise.shape[1]):
        noise[:, row] = memory * noise[:, row - 1] + math.sqrt(1 - memory**2) * noise[:, row]
    rows = np.concatenate([noise[:, 100:], np.full((repeats, ROWS, 1), 64.0)], axis=2)
    rows = rows * [0.5, 100, 1] + [1, 512, 0]
    covered = [x.low <= 512 <= x.high for x in map(noise_scale, rows)]
    shuffled = [x.low <= 512 <= x.high for x in map(noise_scale, rng.permuted(rows, axis=1))]
    assert np.mean(covered) >= 0.91
    assert np.mean(shuffled) < 0.8


@pytest.mark.parametrize("smoothing", [0.99, 0.999])
def test_coverage_holds_with_smoothing(smoothing: float) -> None:
    histories = _histories(2, 512, 10**5, 1000)
    estimates = [noise_scale(rows, smoothing=smoothing) for rows in histories]
    assert 0.93 <= np.mean([x.low <= 512 <= x.high for x in estimates]) <= 0.97


class TestAlternatives:
    """Noise scale 2048 in dimension 1000: |G|² of one measurement is often negative."""

    TRUE = 2048
    ROWS = _measure(np.random.default_rng(3), TRUE, 10**3, 20_000)

    def _error(self, estimate: float) -> float:
        return abs(estimate / self.TRUE - 1)

    def test_the_ratio_of_averages_is_within_5_percent(self) -> None:
        assert self._error(noise_scale(self.ROWS).value) < 0.05

    def test_the_average_of_ratios_is_off_by_more_than_10_percent(self) -> None:
        ratios = self.ROWS[:, 1] / self.ROWS[:, 0]
        assert self._error(ratios.mean()) > 0.1
        assert self._error(np.median(ratios)) > 0.1

    def test_clamping_before_averaging_is_off_by_more_than_10_percent(self) -> None:
        clamped = noise_scale(self.ROWS.clip(min=0)).value
        assert self._error(clamped) > 0.1
