"""Scaling of hyper-parameters: what changes, what stays, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_ext.scaling import scale_hyperparameters, scale_step_count

RULES = ["none", "linear", "linear_samples", "sqrt", "sde"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kappa", [0.25, 3, 64])
def test_decay_of_the_weights_per_sample_is_kept(rule: str, kappa: float) -> None:
    got = scale_hyperparameters(kappa, rule=rule, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert got.weight_decay is not None
    assert got.lr * got.weight_decay == pytest.approx(kappa * 0.1 * 0.01)


def test_linear_keeps_weight_decay_bitwise() -> None:
    got = scale_hyperparameters(7.3, rule="linear", lr=0.1, weight_decay=0.0123)
    assert got.weight_decay == 0.0123


@pytest.mark.parametrize("rule", ["none", "linear", "linear_samples", "sqrt"])
def test_only_sde_moves_betas_and_eps(rule: str) -> None:
    got = scale_hyperparameters(4, rule=rule, lr=1.0, betas=(0.9, 0.99), eps=1e-8, momentum=0.9)
    assert (got.betas, got.eps) == ((0.9, 0.99), 1e-8)


@pytest.mark.parametrize("rule", ["none", "linear", "sqrt", "sde"])
def test_only_linear_samples_moves_momentum(rule: str) -> None:
    assert scale_hyperparameters(4, rule=rule, lr=1.0, momentum=0.9).momentum == 0.9


@pytest.mark.parametrize("betas", [(), (0.99,), (0.9, 0.99, 0.999)])
def test_sde_takes_any_number_of_betas(betas: tuple[float, ...]) -> None:
    got = scale_hyperparameters(2, rule="sde", lr=1.0, betas=betas).betas
    assert got == tuple(beta**2 for beta in betas)


def test_sde_stays_a_decay_rate_where_the_first_order_turns_negative() -> None:
    betas = scale_hyperparameters(64, rule="sde", lr=1.0, betas=(0.9,)).betas
    assert 1 - 64 * (1 - 0.9) < 0
    assert betas == pytest.approx((0.9**64,))


def test_sums_of_the_effects_of_a_gradient_grow_by_kappa() -> None:
    got = scale_hyperparameters(5, rule="linear_samples", lr=0.1, momentum=0.9)
    assert got.momentum == pytest.approx(0.9**5)
    assert got.lr / (1 - 0.9**5) == pytest.approx(5 * 0.1 / (1 - 0.9))


def test_linear_samples_without_memory_is_linear() -> None:
    assert scale_hyperparameters(5, rule="linear_samples", lr=0.1, momentum=0.0).lr == 0.5


@pytest.mark.parametrize("gap", [0.0, 1e-16, 1e-12, 1e-9])
def test_linear_samples_tends_to_kappa_squared_at_full_memory(gap: float) -> None:
    got = scale_hyperparameters(5, rule="linear_samples", lr=0.1, momentum=1 - gap)
    assert got.lr == pytest.approx(0.1 * 25, rel=1e-8)


def test_absent_fields_stay_absent() -> None:
    assert scale_hyperparameters(2, rule="sde", lr=1.0)[1:] == (None,) * 4


@pytest.mark.parametrize("name", ["reference_batch", "noise_scale", "gain", "saturation"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kappa", [1, 2])
def test_an_input_that_the_rule_does_not_use_is_refused(rule: str, name: str, kappa: float) -> None:
    with pytest.raises(ValueError, match=name):
        scale_hyperparameters(kappa, rule=rule, lr=1.0, momentum=0.9, **{name: 64.0})


@pytest.mark.parametrize("kappa", [1, 2])
def test_linear_samples_needs_momentum(kappa: float) -> None:
    with pytest.raises(ValueError, match="momentum="):
        scale_hyperparameters(kappa, rule="linear_samples", lr=1.0)


def test_an_unknown_rule_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match="none, linear, linear_samples, sqrt, sde"):
        scale_hyperparameters(2, rule="quadratic", lr=1.0)


@pytest.mark.parametrize("kappa", [0, -1, math.nan, math.inf])
def test_a_ratio_must_be_finite_and_above_0(kappa: float) -> None:
    with pytest.raises(ValueError, match="kappa"):
        scale_hyperparameters(kappa, rule="linear", lr=1.0)
    with pytest.raises(ValueError, match="kappa"):
        scale_step_count(1.0, kappa)


@pytest.mark.parametrize("kappa", ["2", None, True, torch.tensor(2.0)])
def test_a_ratio_must_be_a_number(kappa: float) -> None:
    with pytest.raises(TypeError, match="kappa"):
        scale_hyperparameters(kappa, rule="linear", lr=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"betas": (0.9, 1.1)},
        {"momentum": -0.1},
        {"eps": -1e-8},
        {"weight_decay": math.inf},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scale_hyperparameters(2, rule="sde", **{"lr": 1.0, **wrong})


def test_numpy_numbers_are_numbers() -> None:
    assert scale_hyperparameters(np.float32(4), rule="sqrt", lr=np.float64(1.0)).lr == 2


def test_a_step_count_may_be_a_tensor() -> None:
    step = scale_step_count(torch.tensor(50.0), 4)
    assert step.dtype == torch.float32
    assert step == 12.5
