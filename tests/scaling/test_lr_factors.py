"""Rules that follow the noise, the saturation, and the laws that they come from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import erf

from lightning_ext.scaling import (
    NOISE_RULES,
    SATURATING_RULES,
    adascale_gain,
    legw_warmup,
    momentum_buffer_scale,
    scale_hyperparameters,
)

KAPPAS = [0.25, 3.0, 64.0]
# Per-sample gradients around one point, and a quadratic loss with another shape than the noise.
SAMPLES = np.array([[3.0, 1.0], [-1.0, 2.0], [1.0, -1.5]])
HESSIAN = np.array([[2.0, 0.6], [0.6, 0.5]])
FULL = {"lr": 1e-3, "betas": (0.9, 0.999), "momentum": 0.9, "eps": 1e-8, "weight_decay": 0.1}


def scaled(rule: str, kappa: float, **inputs: Any):
    return scale_hyperparameters(kappa, rule=rule, **(FULL | inputs))


def factor(rule: str, kappa: float, noise_scale: float, reference_batch: float = 32.0) -> float:
    inputs = {"noise_scale": noise_scale, "reference_batch": reference_batch}
    return scale_hyperparameters(kappa, rule=rule, lr=1.0, **inputs).lr


def batch_gradients(batch: int) -> np.ndarray:
    """The mean gradients of all batches of a size, drawn with replacement, equally likely."""
    indices = list(itertools.product(range(len(SAMPLES)), repeat=batch))
    return SAMPLES[np.array(indices)].mean(axis=1)


def best_step(expected_decrease: Callable[[float], float]) -> float:
    return minimize_scalar(lambda step: -expected_decrease(step), tol=1e-12).x


def best_sgd_step(batch: int) -> float:
    """The step that lowers the loss most on average, over every batch there is."""
    mean, gradients = SAMPLES.mean(axis=0), batch_gradients(batch)

    def decrease(step: float) -> float:
        curvature = np.einsum("ni,ij,nj->n", gradients, HESSIAN, gradients)
        return float(np.mean(step * gradients @ mean - step**2 / 2 * curvature))

    return best_step(decrease)


def sign_noise_scale(signal: np.ndarray, correlation: float) -> float:
    """π·Σ H_ii/(2·Σ_{i≠j} H_ij·s_i·s_j), s = G/σ: where the two halves of the law are equal."""
    off_diagonal = correlation * (signal.sum() ** 2 - (signal**2).sum())
    return math.pi * len(signal) / (2 * off_diagonal)


def best_sign_step(batch: float, signal: np.ndarray, correlation: float) -> float:
    """The same for the signs of Gaussian gradients with σ = 1, H_ii = 1 and H_ij = correlation."""
    mean_sign = erf(signal * math.sqrt(batch / 2))
    pairs = correlation * (mean_sign.sum() ** 2 - (mean_sign**2).sum())
    return best_step(lambda step: step * signal @ mean_sign - step**2 / 2 * (len(signal) + pairs))


@pytest.mark.parametrize("kappa", [2, 3])
def test_the_gain_is_the_ratio_of_second_moments_of_the_gradient(kappa: int) -> None:
    reference, large = (np.mean(np.sum(batch_gradients(b) ** 2, 1)) for b in (2, 2 * kappa))
    mean = SAMPLES.mean(axis=0)
    noise = np.sum(SAMPLES.var(axis=0)) / (mean @ mean)
    gain = adascale_gain(kappa, noise_scale=noise, reference_batch=2)
    assert gain == pytest.approx(reference / large, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_noise_limited_is_the_best_step_of_sgd(batch: int) -> None:
    mean, covariance = SAMPLES.mean(axis=0), np.cov(SAMPLES.T, bias=True)
    noise = np.trace(HESSIAN @ covariance) / (mean @ HESSIAN @ mean)
    got = factor("noise_limited", batch / 2, noise, reference_batch=2)
    assert got == pytest.approx(best_sgd_step(batch) / best_sgd_step(2), rel=1e-6)


@pytest.mark.parametrize("correlation", [0.2, 0.9])
@pytest.mark.parametrize("relative", [0.01, 0.3, 1.0, 4.0])
def test_surge_is_the_best_step_of_the_sign_where_the_noise_dominates(
    relative: float, correlation: float
) -> None:
    signal = 1e-3 * np.linspace(0.5, 1.5, 20_000)
    noise = sign_noise_scale(signal, correlation)
    best, reference = (best_sign_step(noise * b, signal, correlation) for b in (relative, 0.1))
    got = factor("surge", relative / 0.1, noise, reference_batch=0.1 * noise)
    assert got == pytest.approx(best / reference, rel=2e-3)


def test_the_best_step_of_the_sign_peaks_at_the_noise_scale() -> None:
    signal = 1e-3 * np.linspace(0.5, 1.5, 20_000)
    noise = sign_noise_scale(signal, 0.5)
    steps = [best_sign_step(noise * b, signal, 0.5) for b in (0.9, 1.0, 1.1)]
    rates = [factor("surge", b, noise, noise) for b in (0.9, 1.0, 1.1)]
    assert np.argmax(steps) == np.argmax(rates) == 1


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize(
    ("noise_scale", "gain"), [(0.0, lambda k: 1.0), (math.inf, lambda k: k)], ids=["0", "inf"]
)
def test_without_noise_nothing_is_gained_and_with_nothing_else_kappa(
    kappa: float, noise_scale: float, gain: Callable[[float], float]
) -> None:
    assert adascale_gain(kappa, noise_scale=noise_scale, reference_batch=32) == gain(kappa)
    assert factor("adascale", kappa, noise_scale) == gain(kappa)
    assert factor("noise_limited", kappa, noise_scale) == gain(kappa)
    assert factor("surge", kappa, noise_scale) == pytest.approx(gain(kappa) / math.sqrt(kappa))


@pytest.mark.parametrize("kappa", [0.1, 1 / 3, 1.0, 3.0, 7.7])
@pytest.mark.parametrize("noise_scale", [1e-300, 1e-9, 3.0, 1e18, 1e305])
def test_a_gain_never_leaves_its_bounds(kappa: float, noise_scale: float) -> None:
    gain = adascale_gain(kappa, noise_scale=noise_scale, reference_batch=1e-3)
    assert min(1, kappa) <= gain <= max(1, kappa)
    assert scale_hyperparameters(kappa, rule="adascale", lr=1.0, gain=gain).lr == gain


def test_adascale_takes_the_root_for_adams_kind_and_keeps_the_rest() -> None:
    inputs = {"noise_scale": 96, "reference_batch": 32}
    gain = adascale_gain(4, **inputs)
    plain = scaled("adascale", 4, betas=None, **inputs)
    adam = scaled("adascale", 4, **inputs)
    assert (plain.lr, adam.lr) == (1e-3 * gain, 1e-3 * math.sqrt(gain))
    assert adam[1:4] == ((0.9, 0.999), 0.9, 1e-8)
    assert scaled("adascale", 4, gain=gain) == adam


def test_noise_limited_keeps_the_rest_and_never_takes_the_root() -> None:
    got = scaled("noise_limited", 4, noise_scale=96, reference_batch=32)
    assert got.lr == 1e-3 * adascale_gain(4, noise_scale=96, reference_batch=32)
    assert got[1:4] == ((0.9, 0.999), 0.9, 1e-8)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_surge_is_sde_before_anything_is_measured(kappa: float) -> None:
    surge = scaled("surge", kappa, noise_scale=math.inf, reference_batch=32)
    sde = scaled("sde", kappa)
    assert surge[1:4] == sde[1:4]
    assert (surge.lr, surge.weight_decay) == pytest.approx((sde.lr, sde.weight_decay))


@pytest.mark.parametrize("rule", NOISE_RULES)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_decay_of_the_weights_per_sample_is_kept(rule: str, kappa: float) -> None:
    got = scaled(rule, kappa, noise_scale=96, reference_batch=32)
    assert got.lr * got.weight_decay == pytest.approx(kappa * 1e-3 * 0.1)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_legw_is_sqrt_with_a_warm_up_of_as_many_steps(kappa: float) -> None:
    assert scaled("legw", kappa) == scaled("sqrt", kappa)
    assert legw_warmup(6400, kappa) / (32 * kappa) == 6400 / 32


@pytest.mark.parametrize("kappa", KAPPAS)
def test_constant_changes_nothing(kappa: float) -> None:
    given = scale_hyperparameters(1, rule="none", **FULL)
    assert scaled("constant", kappa) == given
    assert scaled("none", kappa).weight_decay == kappa * given.weight_decay


@pytest.mark.parametrize("rule", SATURATING_RULES)
@pytest.mark.parametrize("kappa", [4.0, 64.0])
def test_the_learning_rate_stops_growing_and_the_memory_does_not(rule: str, kappa: float) -> None:
    got = scaled(rule, kappa, saturation=96, reference_batch=32)
    free, limit = scaled(rule, kappa), scaled(rule, 3.0)
    if rule != "linear_samples":
        assert got.lr == limit.lr
    assert got[1:4] == free[1:4]
    assert got.lr * got.weight_decay == pytest.approx(kappa * 1e-3 * 0.1)


@pytest.mark.parametrize("kappa", [4.0, 64.0])
def test_under_linear_samples_the_movement_by_a_gradient_stops_growing(kappa: float) -> None:
    movements = [
        got.lr / (1 - got.momentum)
        for got in (
            scaled("linear_samples", kappa, saturation=96, reference_batch=32),
            scaled("linear_samples", 3.0),
        )
    ]
    assert movements[0] == pytest.approx(movements[1], rel=1e-12)
    assert movements[0] == pytest.approx(3 * 1e-3 / 0.1, rel=1e-12)


@pytest.mark.parametrize("rule", SATURATING_RULES)
@pytest.mark.parametrize(("kappa", "saturation"), [(0.25, 1.0), (0.25, 96.0), (3.0, 96.0)])
def test_below_the_saturation_or_the_reference_nothing_changes(
    rule: str, kappa: float, saturation: float
) -> None:
    got = scaled(rule, kappa, saturation=saturation, reference_batch=32)
    assert got == scaled(rule, kappa) == scaled(rule, kappa, saturation=math.inf, reference_batch=1)


@pytest.mark.parametrize("saturation", [0.0, 5.0, 32.0])
def test_a_saturation_below_the_reference_keeps_the_learning_rate(saturation: float) -> None:
    got = scaled("sde", 16, saturation=saturation, reference_batch=32)
    assert got.lr == 1e-3
    assert got.betas == (0.9**16, 0.999**16)


def test_the_buffer_keeps_its_mean_gradient() -> None:
    steady = [1 / (1 - 0.9**k) for k in (1, 8)]
    assert steady[0] * momentum_buffer_scale(0.9, 8) == pytest.approx(steady[1])


@pytest.mark.parametrize("rule", NOISE_RULES)
@pytest.mark.parametrize("kappa", [1, 2])
def test_a_rule_that_misses_its_input_says_which(rule: str, kappa: float) -> None:
    with pytest.raises(ValueError, match=rf"'{rule}' needs noise_scale= and reference_batch=.*inf"):
        scaled(rule, kappa)
    with pytest.raises(ValueError, match=rf"'{rule}' needs reference_batch="):
        scaled(rule, kappa, noise_scale=64.0)
    with pytest.raises(ValueError, match=rf"'{rule}' needs noise_scale="):
        scaled(rule, kappa, reference_batch=64.0)


def test_a_saturation_needs_the_batch_that_the_learning_rate_belongs_to() -> None:
    with pytest.raises(ValueError, match="with saturation= needs reference_batch=, the global"):
        scaled("linear", 2, saturation=64.0)


@pytest.mark.parametrize(
    ("rule", "inputs", "unused"),
    [
        ("adascale", {"gain": 1.5, "noise_scale": 64.0}, "noise_scale"),
        ("adascale", {"noise_scale": 64.0, "reference_batch": 32, "saturation": 1.0}, "saturation"),
        ("noise_limited", {"noise_scale": 64.0, "reference_batch": 32, "gain": 1.0}, "gain"),
        ("surge", {"noise_scale": 64.0, "reference_batch": 32, "gain": 1.0}, "gain"),
        ("constant", {"saturation": 64.0, "reference_batch": 32}, "reference_batch, saturation"),
        ("linear", {"reference_batch": 32}, "reference_batch"),
        ("sde", {"saturation": 64.0, "reference_batch": 32, "gain": 1.0}, "gain"),
    ],
)
def test_an_input_too_many_is_refused(rule: str, inputs: dict[str, float], unused: str) -> None:
    with pytest.raises(ValueError, match=f"does not use {unused};"):
        scaled(rule, 2, **inputs)


@pytest.mark.parametrize("wrong", [-1.0, -math.inf, math.nan])
def test_an_estimate_that_cannot_be_a_noise_scale_is_refused_with_a_hint(wrong: float) -> None:
    for rule, name in [("surge", "noise_scale"), ("linear", "saturation")]:
        with pytest.raises(ValueError, match=rf"{name}={wrong}.*average more measurements"):
            scaled(rule, 2, reference_batch=32, **{name: wrong})
    with pytest.raises(ValueError, match=rf"noise_scale={wrong}.*average more measurements"):
        adascale_gain(2, noise_scale=wrong, reference_batch=32)


@pytest.mark.parametrize(("kappa", "gain"), [(4, 0.99), (4, 4.01), (0.5, 1.01), (4, math.nan)])
def test_a_gain_out_of_its_bounds_is_refused(kappa: float, gain: float) -> None:
    with pytest.raises(ValueError, match=rf"gain={gain}.*between.*adascale_gain"):
        scaled("adascale", kappa, gain=gain)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: adascale_gain(x, noise_scale=1, reference_batch=1), "kappa"),
        (lambda x: adascale_gain(2, noise_scale=1, reference_batch=x), "reference_batch"),
        (lambda x: scaled("surge", 2, noise_scale=1, reference_batch=x), "reference_batch"),
        (lambda x: legw_warmup(1, x), "kappa"),
        (lambda x: legw_warmup(x - 1, 1), "warmup_samples"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(
    call: Callable[[float], object], name: str
) -> None:
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=name):
            call(wrong)


@pytest.mark.parametrize("name", ["noise_scale", "gain"])
def test_an_input_must_be_a_number(name: str) -> None:
    inputs = {"reference_batch": 32} if name == "noise_scale" else {}
    with pytest.raises(TypeError, match=name):
        scaled("adascale", 2, **inputs, **{name: "64"})
