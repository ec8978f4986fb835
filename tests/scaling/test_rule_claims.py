"""What the tests of the batch gradient do at a constant noise scale, computed and simulated.

The simulated gradients are G + ξ with |G|² = 1 and ξ Gaussian, tr Σ the noise scale, in 10,000
dimensions, each batch in 8 parts.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from lightning_ext.scaling import (
    AugmentedTest,
    BatchRule,
    CoordinateTest,
    InnerProducts,
    InnerProductTest,
    NoiseScale,
    NormTest,
    Observation,
    noise_scale,
    noise_statistics,
)

DIM, PARTS, START, ETA = 10_000, 8, 64, 0.5
scales = pytest.mark.parametrize("scale", [64, 512, 4096])


def _target(rule: BatchRule, batch: int, noise: NoiseScale) -> float:
    answer = rule.propose(Observation(batch, 0, noise))
    assert answer is not None
    return answer.target_batch


def _known(scale: float) -> NoiseScale:
    return NoiseScale(scale, scale, scale, 1.0, scale, START)


def _path(eta: float, scale: float, *, plug_in: bool, tests: int = 60) -> list[int]:
    """Batches of as many tests, each the larger of the last and the proposed one."""
    batches = [START]
    for _ in range(tests):
        target = _target(NormTest(eta, plug_in), batches[-1], _known(scale))
        batches.append(max(batches[-1], math.ceil(target)))
    return batches


@cache
def _measured(scale: int, batch: int = START, steps: int = 200) -> NoiseScale:
    rng, sizes = np.random.default_rng(scale), [batch // PARTS] * PARTS
    mean, spread = DIM**-0.5, math.sqrt(scale * PARTS / (batch * DIM))
    history = []
    for _ in range(steps):
        parts = mean + spread * rng.standard_normal((PARTS, DIM))
        whole = parts.mean(0)
        row = noise_statistics((parts**2).sum(1).tolist(), sizes, float(whole @ whole))
        history.append((*row, batch))
    return noise_scale(history)


@scales
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_one_plug_in_test_asks_for_the_harmonic_mean_and_no_more_than_b_over_eta_squared(
    scale: int, eta: float
) -> None:
    target = _target(NormTest(eta, plug_in=True), START, _known(scale))
    assert target == pytest.approx(START * scale / (START + scale) / eta**2)
    assert target < START / eta**2


@scales
def test_one_unbiased_test_asks_for_the_batch_that_passes(scale: int) -> None:
    batches = _path(ETA, scale, plug_in=False)
    assert batches[1:] == [scale / ETA**2] * 60


@scales
@pytest.mark.parametrize("eta", [0.1, 0.5, 0.7])
def test_the_plug_in_test_comes_to_rest_below_the_batch_that_passes(scale: int, eta: float) -> None:
    fixed = scale * (1 - eta**2) / eta**2
    batches = _path(eta, scale, plug_in=True)
    assert all(after <= math.ceil(before / eta**2) for before, after in pairwise(batches))
    assert batches[-1] == pytest.approx(fixed, abs=2)
    assert batches[-1] < scale / eta**2


@pytest.mark.parametrize("scale", [64, 512, 4096, 10**9])
@pytest.mark.parametrize("eta", [1.0, 1.5])
def test_the_plug_in_test_never_grows_from_an_eta_of_1_on(scale: int, eta: float) -> None:
    assert _path(eta, scale, plug_in=True)[-1] == START


@scales
def test_tests_to_come_within_5_percent_of_rest(scale: int) -> None:
    fixed = scale * (1 - ETA**2) / ETA**2
    tests = next(k for k, b in enumerate(_path(ETA, scale, plug_in=True)) if b >= 0.95 * fixed)
    # 1/B − 1/B* shrinks by η² a test.
    gap = (1 / START - 1 / fixed) / (1 / (0.95 * fixed) - 1 / fixed)
    assert tests == math.ceil(math.log(gap, 1 / ETA**2))
    assert tests == {64: 3, 512: 5, 4096: 6}[scale]


@scales
def test_simulated_gradients_give_the_plug_in_target_of_the_equation(scale: int) -> None:
    target = _target(NormTest(ETA, plug_in=True), START, _measured(scale))
    assert target == pytest.approx(START * scale / (START + scale) / ETA**2, rel=0.01)


@scales
def test_simulated_gradients_give_the_unbiased_target_within_its_interval(scale: int) -> None:
    noise = _measured(scale)
    target = _target(NormTest(ETA), START, noise)
    assert noise.low / ETA**2 < scale / ETA**2 < noise.high / ETA**2
    assert target == pytest.approx(scale / ETA**2, rel={64: 0.01, 512: 0.03, 4096: 0.25}[scale])


def _inner_products(scale: int, spectrum: np.ndarray, steps: int) -> np.ndarray:
    """Rows of single batches of real samples, Σ diagonal with the trace ``scale``."""
    rng, dim = np.random.default_rng(scale), len(spectrum)
    spread = np.sqrt(scale * spectrum / spectrum.sum())
    rows = []
    for _ in range(steps):
        gradients = dim**-0.5 + spread * rng.standard_normal((START, dim))
        mean = gradients.mean(0)
        along, sq_norm = (gradients @ mean).var(ddof=1), mean @ mean
        rows.append((along, sq_norm, sq_norm**2, gradients.var(0, ddof=1).sum()))
    return np.array(rows)


@scales
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_the_direction_of_the_batch_adds_its_own_noise_to_the_inner_products(
    scale: int, decay: float
) -> None:
    spectrum = np.arange(1.0, 501.0) ** -decay
    sigma = scale * spectrum / spectrum.sum()
    rows = _inner_products(scale, spectrum, steps=200)[:, :2]
    expected = sigma.mean() + (sigma**2).sum() / START, 1 + scale / START  # GᵀΣG + tr Σ²/B
    errors = rows.std(0, ddof=1) / math.sqrt(len(rows))
    assert (abs(rows.mean(0) - expected) < 4 * errors).all()


@scales
def test_the_published_bounds_do_not_grow_a_batch_of_isotropic_noise(scale: int) -> None:
    rows = _inner_products(scale, np.ones(DIM), steps=20)
    seen = Observation(START, 0, inner_products=InnerProducts(*rows.mean(0).tolist()))
    for rule in (InnerProductTest(0.5), AugmentedTest(), AugmentedTest(0.5, 1.0)):
        answer = rule.propose(seen)
        assert answer is not None
        assert answer.target_batch < START
    across = AugmentedTest(0.5, 0.5).propose(seen)
    assert across is not None
    assert across.target_batch == pytest.approx(4 * START * scale / (START + scale), rel=0.01)


@pytest.mark.parametrize(("fraction", "ratio"), [(0.5, 2.2), (0.9, 63.0), (0.99, 6400.0)])
def test_coordinates_of_pure_noise_grow_the_batch_all_the_same(
    fraction: float, ratio: float
) -> None:
    parts = np.random.default_rng(0).standard_normal((START, 10 * DIM))
    ratios = parts.var(0, ddof=1) / parts.mean(0) ** 2
    measured = {fraction: float(np.quantile(ratios, fraction))}
    answer = CoordinateTest(ETA, fraction).propose(Observation(START, 0, coordinates=measured))
    assert answer is not None
    # 4 standard errors of a quantile of 1/z², and 2 % for the spread of the variances.
    error = 8 / math.sqrt(10 * DIM * (1 - fraction)) + 0.02
    assert answer.target_batch == pytest.approx(ratio * START / ETA**2, rel=error)
