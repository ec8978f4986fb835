"""A change of the batch in the middle of a run goes on without a jump."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from lightning_ext.optim import BatchScaling

GRADIENT = 0.5
KAPPAS = pytest.mark.parametrize("kappa", [0.25, 2.0, 3.0, 16.0])


def moves(optimizer: Optimizer, steps: int = 1) -> list[float]:
    """Lengths of steps under a constant gradient."""
    (parameter,) = optimizer.param_groups[0]["params"]
    lengths = []
    for _ in range(steps):
        before = parameter.item()
        parameter.grad = torch.full_like(parameter, GRADIENT)
        optimizer.step()
        lengths.append(before - parameter.item())
    return lengths


def scalar() -> list[Parameter]:
    return [Parameter(torch.zeros((), dtype=torch.float64))]


def step_count(optimizer: Optimizer) -> float:
    (state,) = optimizer.state.values()
    return float(state["step"])


@KAPPAS
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_the_second_moment_does_not_notice_a_switch_at_step_50(cls, kappa: float) -> None:
    optimizer = cls(scalar(), lr=1e-3, eps=0.0, weight_decay=0.0)
    scaling = BatchScaling(optimizer)
    moves(optimizer, 50)
    scaling.set_kappa(kappa)
    (state,) = optimizer.state.values()
    for _ in range(3):
        v_hat = state["exp_avg_sq"].item() / (1 - (0.999**kappa) ** state["step"].item())
        assert v_hat == pytest.approx(GRADIENT**2, rel=1e-6)
        moves(optimizer)
    assert step_count(optimizer) == pytest.approx(50 / kappa + 3)


@KAPPAS
@pytest.mark.parametrize("cls", [Adam, AdamW, Adamax])
def test_the_step_after_a_switch_has_the_length_of_the_scaled_lr(cls, kappa: float) -> None:
    optimizer = cls(scalar(), lr=1e-3, eps=0.0, weight_decay=0.0)
    scaling = BatchScaling(optimizer)
    moves(optimizer, 6)
    scaling.set_kappa(kappa)
    assert moves(optimizer, 3) == pytest.approx([1e-3 * math.sqrt(kappa)] * 3, rel=1e-6)


@KAPPAS
def test_going_back_restores_the_count(kappa: float) -> None:
    optimizer = Adam(scalar(), lr=1e-3)
    scaling = BatchScaling(optimizer)
    moves(optimizer, 50)
    scaling.set_kappa(kappa)
    assert step_count(optimizer) == pytest.approx(50 / kappa)
    scaling.set_kappa(1.0)
    assert step_count(optimizer) == pytest.approx(50, rel=1e-6)
    assert step_count(optimizer) == 50 or math.log2(kappa) % 1 != 0


def test_kappa_at_the_start_divides_nothing() -> None:
    optimizer = Adam(scalar(), lr=1e-3)
    moves(optimizer, 50)
    BatchScaling(optimizer, kappa=4.0).set_kappa(4.0)
    assert step_count(optimizer) == 50


@pytest.mark.parametrize("rule", ["none", "linear", "sqrt"])
def test_a_rule_that_keeps_betas_keeps_the_count(rule: str) -> None:
    optimizer = Adam(scalar(), lr=1e-3)
    moves(optimizer, 50)
    BatchScaling(optimizer, rule).set_kappa(4.0)
    assert step_count(optimizer) == 50


def test_moments_stay() -> None:
    optimizer = Adam(scalar(), lr=1e-3)
    moves(optimizer, 50)
    (state,) = optimizer.state.values()
    before = state["exp_avg"].item(), state["exp_avg_sq"].item()
    BatchScaling(optimizer).set_kappa(4.0)
    assert (state["exp_avg"].item(), state["exp_avg_sq"].item()) == before


def test_the_count_stays_the_tensor_that_it_was() -> None:
    optimizer = Adam(scalar(), lr=1e-3, fused=True)
    moves(optimizer, 8)
    (state,) = optimizer.state.values()
    step = state["step"]
    BatchScaling(optimizer).set_kappa(4.0)
    assert state["step"] is step
    assert step.dtype == torch.float32
    assert step.item() == 2


def test_a_count_that_is_a_number_is_divided() -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = SparseAdam([parameter], lr=1e-3)
    for _ in range(8):
        parameter.grad = torch.ones(3).to_sparse()
        optimizer.step()
    BatchScaling(optimizer).set_kappa(4.0)
    assert step_count(optimizer) == 2
    optimizer.step()
    assert step_count(optimizer) == 3


def test_rmsprop_keeps_its_average_per_sample() -> None:
    optimizer = RMSprop(scalar(), lr=1e-3, eps=0.0)
    scaling = BatchScaling(optimizer)
    moves(optimizer, 2000)
    scaling.set_kappa(4.0)
    assert moves(optimizer, 3) == pytest.approx([2e-3] * 3, rel=1e-6)


def nadam_factor(optimizer: NAdam, scaling: BatchScaling) -> float:
    """μ_t/β₁ = 1 − ½·0.96^(t·ψ) of the next step (Dozat 2016), from the values in that step."""
    seen = []

    def closure() -> None:
        (group,) = optimizer.param_groups
        (state,) = optimizer.state.values()
        seen.append(1 - 0.5 * 0.96 ** (state["step"].item() * group["momentum_decay"]))

    optimizer.step(closure)
    return seen[0]


@KAPPAS
def test_nadams_schedule_of_the_momentum_does_not_jump(kappa: float) -> None:
    factors = []
    for switch in (1.0, kappa):
        optimizer = NAdam(scalar(), lr=1e-3, momentum_decay=0.3)
        scaling = BatchScaling(optimizer)
        moves(optimizer, 50)
        scaling.set_kappa(switch)
        factors.append(nadam_factor(optimizer, scaling))
        assert optimizer.param_groups[0]["momentum_decay"] == 0.3
    assert factors[1] == pytest.approx(factors[0], rel=1e-6)


def test_nadam_at_kappa_is_bitwise_a_plain_one() -> None:
    scaled = NAdam(scalar(), lr=1e-3, momentum_decay=0.3)
    plain = NAdam(scalar(), 2e-3, (0.9**4, 0.999**4), 5e-9, momentum_decay=1.2)
    BatchScaling(scaled, kappa=4.0)
    assert moves(scaled, 20) == moves(plain, 20)


def test_nadam_keeps_the_length_of_its_step() -> None:
    optimizer = NAdam(scalar(), lr=1e-3, eps=0.0)
    scaling = BatchScaling(optimizer)
    before = moves(optimizer, 200)[-1]
    scaling.set_kappa(2.0)
    assert moves(optimizer)[0] / before == pytest.approx(math.sqrt(2), rel=1e-3)


@KAPPAS
def test_radams_rectification_does_not_jump(kappa: float) -> None:
    # Under a constant gradient the length of a step is lr times the rectification.
    optimizer = RAdam(scalar(), lr=1e-3, eps=0.0)
    scaling = BatchScaling(optimizer)
    before = moves(optimizer, 1000)[-1] / 1e-3
    assert 0.2 < before < 0.9
    scaling.set_kappa(kappa)
    after = moves(optimizer)[0] / (1e-3 * math.sqrt(kappa))
    later = RAdam(scalar(), lr=1e-3, eps=0.0)  # by as many samples
    # ρ_t (Liu et al. 2020) counts whole steps: ρ_t/ρ_∞ goes on up to the order of 1/t.
    error = after / (moves(later, 1000 + round(kappa))[-1] / 1e-3) - 1
    assert abs(error) < 4 * max(1, kappa) / 1000


def test_radam_switched_before_its_sixth_step_of_the_new_size_is_not_adaptive_again() -> None:
    lengths = []
    for steps in (16, 24):
        optimizer = RAdam(scalar(), lr=1e-3, eps=0.0)
        scaling = BatchScaling(optimizer)
        moves(optimizer, steps)
        scaling.set_kappa(4.0)
        lengths += moves(optimizer)
    assert lengths[0] == pytest.approx(2e-3 * GRADIENT)  # lr·m, where m/√v would be 1
    assert lengths[1] < 2e-3 * 0.2


@KAPPAS
def test_momentum_in_samples_moves_as_far_per_sample_after_a_switch(kappa: float) -> None:
    optimizer = SGD(scalar(), lr=1e-3, momentum=0.9)
    scaling = BatchScaling(optimizer, "linear_samples")
    before = moves(optimizer, 500)[-1]
    scaling.set_kappa(kappa)
    assert moves(optimizer, 5) == pytest.approx([before * kappa] * 5, rel=1e-9)
    scaling.set_kappa(1.0)
    assert moves(optimizer, 5) == pytest.approx([before] * 5, rel=1e-9)


def test_a_momentum_that_does_not_change_keeps_its_buffer() -> None:
    optimizer = SGD(scalar(), lr=1e-3, momentum=0.9)
    scaling = BatchScaling(optimizer)
    moves(optimizer, 5)
    (state,) = optimizer.state.values()
    before = state["momentum_buffer"].item()
    scaling.set_kappa(4.0)
    assert state["momentum_buffer"].item() == before


def test_a_switch_before_the_first_step_makes_no_state() -> None:
    optimizer = SGD(scalar(), lr=1e-3, momentum=0.9)
    BatchScaling(optimizer, "linear_samples").set_kappa(4.0)
    assert not optimizer.state


def _noisy_run(kappa: float, *, scaled: bool, steps: int = 400) -> float:
    """The second moment right after a switch over that of the larger batch at the end."""
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.99))
    scaling = BatchScaling(optimizer, scale_second_moment=scaled)

    def step(batch: float) -> None:
        noise = torch.randn(20_000, dtype=torch.float64, generator=generator)
        weight.grad = noise / batch**0.5
        optimizer.step()

    for _ in range(steps):
        step(1.0)
    scaling.set_kappa(kappa)
    switched = optimizer.state[weight]["exp_avg_sq"].mean().item()
    for _ in range(round(2 * steps / min(kappa, 1.0))):
        step(kappa)
    return switched / optimizer.state[weight]["exp_avg_sq"].mean().item()


@pytest.mark.parametrize("kappa", [4.0, 16.0, 0.25])
def test_the_second_moment_of_noise_may_follow_at_once(kappa: float) -> None:
    assert _noisy_run(kappa, scaled=True) == pytest.approx(1, rel=0.02)
    assert _noisy_run(kappa, scaled=False) == pytest.approx(kappa, rel=0.02)


def test_with_a_noise_scale_the_second_moment_changes_by_the_gain() -> None:
    weight = Parameter(torch.ones(3))
    optimizer = torch.optim.RMSprop([weight], lr=0.1)
    options = {"reference_batch": 64, "noise_scale": 64.0, "clamp": True}
    scaling = BatchScaling(optimizer, scale_second_moment=True, **options)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = optimizer.state[weight]["square_avg"].clone()
    with pytest.warns(UserWarning, match="above the noise scale"):
        scaling.set_kappa(4.0, noise_scale=64.0)
    # 1 + 64/64 before, 1 + 64/256 after.
    assert torch.allclose(optimizer.state[weight]["square_avg"], before * 1.25 / 2)
    scaling.set_kappa(1.0, noise_scale=64.0)
    assert torch.allclose(optimizer.state[weight]["square_avg"], before)
