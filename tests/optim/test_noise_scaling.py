"""Learning rates that follow the noise scale, stop growing at it, or have a factor of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_ext.optim import BatchScaling
from lightning_ext.scaling import (
    HYPERPARAMETER_RULES,
    NOISE_RULES,
    SATURATING_RULES,
    adascale_gain,
    scale_hyperparameters,
)

REFERENCE, NOISE = 32, 96.0
noise_rules = pytest.mark.parametrize("rule", NOISE_RULES)


def sgd(**kwargs: Any) -> SGD:
    return SGD([Parameter(torch.ones(3, dtype=torch.float64))], lr=0.1, momentum=0.9, **kwargs)


def adamw() -> AdamW:
    return AdamW([Parameter(torch.ones(3, dtype=torch.float64))], lr=0.1, weight_decay=0.1)


def following(optimizer: Optimizer, rule: str, **kwargs: Any) -> BatchScaling:
    return BatchScaling(optimizer, rule, reference_batch=REFERENCE, **kwargs)


def train(optimizer: Optimizer, steps: int, gradient: float | None = None) -> list[float]:
    """How far each step moved the first weight."""
    (parameter,) = optimizer.param_groups[0]["params"]
    moves = []
    for step in range(steps):
        wave = torch.sin(torch.arange(3, dtype=torch.float64) + step)
        parameter.grad = wave if gradient is None else torch.full_like(parameter, gradient)
        before = parameter[0].item()
        optimizer.step()
        moves.append(before - parameter[0].item())
    return moves


def during_step(optimizer: Optimizer) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []
    (group,) = optimizer.param_groups
    optimizer.step(lambda: seen.append(dict(group)))
    return seen[0]


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    (state,) = optimizer.state.values()
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


@pytest.mark.parametrize("rule", HYPERPARAMETER_RULES)
def test_at_the_reference_batch_nothing_changes_whatever_the_noise(rule: str) -> None:
    plain, optimizer = sgd(), sgd()
    scaling = following(optimizer, rule, noise_scale=NOISE, clamp=True)
    scaling.set_lr_factor(1.0)
    train(plain, 5)
    train(optimizer, 3)
    scaling.set_kappa(1.0, noise_scale=3.0)
    for step in (3, 4):
        optimizer.param_groups[0]["params"][0].grad = torch.sin(torch.arange(3).double() + step)
        optimizer.step()
    assert torch.equal(plain.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0])


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("rule", [*NOISE_RULES, "legw", "constant"])
@pytest.mark.parametrize("kappa", [0.5, 8.0])
def test_a_step_has_the_values_of_the_formula(make, rule: str, kappa: float) -> None:
    optimizer = make()
    (group,) = optimizer.param_groups
    following(optimizer, rule, kappa=kappa, noise_scale=NOISE)
    noise = {"noise_scale": NOISE, "reference_batch": REFERENCE} if rule in NOISE_RULES else {}
    fields = ("momentum",) if make is sgd else ("betas", "eps", "weight_decay")
    given = {field: group[field] for field in fields}
    expected = scale_hyperparameters(kappa, rule=rule, lr=1.0, **given, **noise)
    inside = during_step(optimizer)
    assert inside["lr"] == 0.1 * expected.lr
    assert {field: inside[field] for field in fields} == {
        field: getattr(expected, field) for field in fields
    }


@pytest.mark.parametrize(
    ("make", "rule", "factor"),
    [
        (sgd, "adascale", 4.0),
        (adamw, "adascale", 2.0),
        (sgd, "noise_limited", 4.0),
        (adamw, "surge", 2.0),
    ],
)
def test_before_a_measurement_the_batch_counts_as_small(make, rule: str, factor: float) -> None:
    scaling = following(make(), rule, kappa=4.0)
    assert scaling.noise_scale is None
    assert scaling.lrs() == [0.1 * factor]
    scaling.set_kappa(4.0, noise_scale=NOISE)
    assert scaling.lrs()[0] < 0.1 * factor
    scaling.set_kappa(4.0)
    assert scaling.lrs() == [0.1 * factor]


def test_rmsprop_is_of_adams_kind() -> None:
    scaling = following(RMSprop([Parameter(torch.ones(1))], lr=0.1), "adascale", kappa=4.0)
    assert scaling.lrs() == [0.2]


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        *((make, rule) for make in (sgd, adamw) for rule in (*NOISE_RULES, "linear", "sde")),
        (sgd, "linear_samples"),
    ],
)
@pytest.mark.filterwarnings("ignore:The global batch of")
def test_another_noise_scale_moves_the_learning_rate_and_not_the_state(make, rule: str) -> None:
    optimizer = make()
    scaling = following(optimizer, rule, kappa=8.0, clamp=True, noise_scale=1e6)
    train(optimizer, 4)
    before, lrs = state_of(optimizer), scaling.lrs()
    scaling.set_kappa(8.0, noise_scale=NOISE)
    after = state_of(optimizer)
    assert scaling.lrs()[0] < lrs[0]
    assert scaling.noise_scale == NOISE
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value))


def test_batch_and_noise_may_change_together() -> None:
    optimizer = adamw()
    scaling = following(optimizer, "surge")
    train(optimizer, 48)
    scaling.set_kappa(4.0, noise_scale=NOISE)
    assert state_of(optimizer)["step"] == 12
    scaling.set_kappa(8.0, noise_scale=2 * NOISE)
    assert state_of(optimizer)["step"] == 6


def test_nadams_momentum_decay_follows_under_surge() -> None:
    optimizer = NAdam([Parameter(torch.ones(1))], momentum_decay=0.3)
    following(optimizer, "surge", kappa=4.0, noise_scale=NOISE)
    assert during_step(optimizer)["momentum_decay"] == 1.2


def test_surge_peaks_where_the_batch_is_the_noise_scale() -> None:
    scaling = following(adamw(), "surge", noise_scale=NOISE)
    lrs = []
    for kappa in (2.9, 3.0, 3.1, 300.0):
        scaling.set_kappa(kappa, noise_scale=NOISE)
        lrs += scaling.lrs()
    assert lrs[0] < lrs[1] > lrs[2] > 0.1 > lrs[3]


@noise_rules
def test_a_rule_that_needs_the_reference_batch_says_so(rule: str) -> None:
    with pytest.raises(ValueError, match=rf"rule='{rule}' needs reference_batch="):
        BatchScaling(sgd(), rule)
    with pytest.raises(ValueError, match=r"clamp=True needs reference_batch="):
        BatchScaling(sgd(), clamp=True)


@pytest.mark.parametrize("rule", ["surge", "linear"])
@pytest.mark.parametrize("wrong", [-1.0, math.nan])
def test_a_wrong_noise_scale_is_refused_and_changes_nothing(rule: str, wrong: float) -> None:
    scaling = following(sgd(), rule, kappa=2.0, noise_scale=NOISE)
    lrs = scaling.lrs()
    with pytest.raises(ValueError, match=rf"noise_scale={wrong}.*average more"):
        scaling.set_kappa(4.0, noise_scale=wrong)
    assert (scaling.kappa, scaling.noise_scale, scaling.lrs()) == (2.0, NOISE, lrs)


def test_a_wrong_reference_batch_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="reference_batch=0"):
        BatchScaling(sgd(), reference_batch=0)


@pytest.mark.parametrize("rule", HYPERPARAMETER_RULES)
def test_only_adascale_gains_less_than_the_batch_grows(rule: str) -> None:
    scaling = following(sgd(), rule, kappa=4.0, noise_scale=NOISE)
    gain = adascale_gain(4.0, noise_scale=NOISE, reference_batch=REFERENCE)
    assert scaling.gain == (gain if rule == "adascale" else 4.0)
    scaling.set_kappa(8.0)
    assert scaling.gain == 8.0


@pytest.mark.parametrize("rule", SATURATING_RULES)
def test_a_clamped_learning_rate_stays_where_the_noise_scale_is_reached(rule: str) -> None:
    scaling = following(sgd(), rule, clamp=True)
    scaling.set_kappa(3.0, noise_scale=NOISE)
    reached = scaling.lrs()[0]
    assert reached > 0.1
    with pytest.warns(UserWarning, match="no longer grows"):
        scaling.set_kappa(6.0, noise_scale=NOISE)
    momentum = during_step(scaling.optimizer)["momentum"]
    assert scaling.lrs()[0] * 0.1 / (1 - momentum) == pytest.approx(
        reached * 0.1 / (1 - (0.9**3 if rule == "linear_samples" else 0.9))
    )


def test_clamping_lets_betas_and_decay_follow() -> None:
    optimizer = adamw()
    with pytest.warns(UserWarning, match="no longer grows"):
        following(optimizer, "sde", kappa=8.0, noise_scale=2.0 * REFERENCE, clamp=True)
    inside = during_step(optimizer)
    assert inside["lr"] == 0.1 * math.sqrt(2)
    assert inside["betas"] == (0.9**8, 0.999**8)
    assert inside["lr"] * inside["weight_decay"] == pytest.approx(8 * 0.1 * 0.1)


@pytest.mark.parametrize(
    ("rule", "kappa", "noise_scale", "clamp"),
    [
        ("linear", 8.0, NOISE, False),
        ("linear", 8.0, None, True),
        ("linear", 8.0, math.inf, True),
        ("linear", 3.0, NOISE, True),
        ("linear", 0.5, 1.0, True),
        ("none", 8.0, NOISE, True),
        ("constant", 8.0, NOISE, True),
        *((rule, 8.0, NOISE, True) for rule in NOISE_RULES),
    ],
)
def test_where_nothing_is_clamped_nothing_changes_or_warns(
    rule: str, kappa: float, noise_scale: float | None, clamp: bool
) -> None:
    scaling = following(sgd(), rule, kappa=kappa, noise_scale=noise_scale, clamp=clamp)
    noise = noise_scale if rule in NOISE_RULES else None
    assert scaling.lrs() == following(sgd(), rule, kappa=kappa, noise_scale=noise).lrs()


def test_the_warning_names_the_numbers_and_comes_once() -> None:
    scaling = following(sgd(), "linear", clamp=True)
    message = (
        r"batch of 256 is above the noise scale of 96 samples.*no longer grows.*Hint: clamp_lr"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        scaling.set_kappa(8.0, noise_scale=NOISE)
    assert caught[0].filename == __file__
    scaling.set_kappa(16.0, noise_scale=NOISE)
    scaling.set_kappa(16.0, noise_scale=3.0)
    assert scaling.lrs() == [0.1]


@pytest.mark.filterwarnings("ignore:The global batch of")
def test_what_is_no_longer_known_no_longer_clamps() -> None:
    scaling = following(sgd(), "linear", kappa=8.0, noise_scale=NOISE, clamp=True)
    assert scaling.lrs() == [0.1 * 3.0]
    scaling.set_kappa(8.0)
    assert scaling.lrs() == [0.8]


@pytest.mark.filterwarnings("ignore:The global batch of")
@pytest.mark.parametrize(("kappa", "limited"), [(2.0, 2.0), (8.0, 3.0), (0.25, 0.25)])
def test_a_clamped_switch_of_the_momentum_makes_no_step_jump(kappa: float, limited: float) -> None:
    optimizer = sgd()
    scaling = following(optimizer, "linear_samples", clamp=True)
    before = train(optimizer, 500, gradient=0.5)[-1]
    scaling.set_kappa(kappa, noise_scale=NOISE)
    # Every step at once: what the buffer moves is held back as much as a new gradient.
    assert train(optimizer, 5, gradient=0.5) == pytest.approx([before * limited] * 5, rel=1e-9)
    scaling.set_kappa(1.0, noise_scale=NOISE)
    assert train(optimizer, 5, gradient=0.5) == pytest.approx([before] * 5, rel=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_the_factor_multiplies_every_group_during_the_step(kappa: float) -> None:
    first, second = (Parameter(torch.ones(1)) for _ in range(2))
    optimizer = AdamW([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.01}])
    reference = [dict(group) for group in optimizer.param_groups]
    scaling = BatchScaling(optimizer, kappa=kappa)
    plain = scaling.lrs()
    scaling.set_lr_factor(0.25)
    assert scaling.lr_factor == 0.25
    assert scaling.lrs() == [0.25 * lr for lr in plain]
    inside: list[Any] = []
    optimizer.step(lambda: inside.extend(dict(group) for group in optimizer.param_groups))
    assert [group["lr"] for group in inside] == scaling.lrs() == scaling.last_lrs
    assert [dict(group) for group in optimizer.param_groups] == reference


@pytest.mark.parametrize("make", [sgd, adamw])
def test_the_factor_touches_the_learning_rate_alone(make) -> None:
    optimizer = make()
    (group,) = optimizer.param_groups
    reference = dict(group)
    BatchScaling(optimizer).set_lr_factor(0.25)
    assert during_step(optimizer) | {"lr": 0.1} == reference


def test_decay_goes_with_the_factor_as_with_a_scheduler() -> None:
    scheduled, optimizer = adamw(), adamw()
    scheduled.param_groups[0]["lr"] = 0.1 * 0.25
    BatchScaling(optimizer).set_lr_factor(0.25)
    assert train(optimizer, 5) == train(scheduled, 5)


def test_a_factor_of_1_puts_everything_back() -> None:
    plain, optimizer = sgd(), sgd()
    scaling = BatchScaling(optimizer)
    scaling.set_lr_factor(0.0)
    assert train(optimizer, 2) == [0.0, 0.0]
    train(plain, 2)
    scaling.set_lr_factor(1.0)
    assert scaling.lrs() == [0.1]
    assert train(optimizer, 3) == pytest.approx(train(plain, 3), rel=1e-12)


def test_a_learning_rate_in_a_tensor_has_the_factor_too() -> None:
    lr = torch.tensor(0.1)
    optimizer = Adam([Parameter(torch.ones(1))], lr=lr)
    BatchScaling(optimizer).set_lr_factor(0.5)
    inside = during_step(optimizer)["lr"]
    assert isinstance(inside, torch.Tensor)
    assert inside == 0.05
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_wrong_factor_is_refused_and_changes_nothing(wrong: float) -> None:
    scaling = BatchScaling(sgd())
    scaling.set_lr_factor(0.5)
    with pytest.raises(ValueError, match=rf"lr_factor={wrong} is not allowed"):
        scaling.set_lr_factor(wrong)
    assert scaling.lr_factor == 0.5


@noise_rules
@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_run_goes_on_from_its_plain_state(make, rule: str) -> None:
    def run(interrupted: bool) -> list[float]:
        optimizer = make()
        scaling = following(optimizer, rule)
        train(optimizer, 6)
        scaling.set_kappa(4.0, noise_scale=NOISE)
        scaling.set_lr_factor(0.5)
        moves = train(optimizer, 3)
        if interrupted:
            saved = [scaling.kappa, scaling.noise_scale, scaling.lr_factor]
            assert all(type(value) is float for value in saved)
            scaling.detach()
            scaling = following(optimizer, rule, kappa=saved[0], noise_scale=saved[1])
            scaling.set_lr_factor(saved[2])
        moves += train(optimizer, 3)
        scaling.set_kappa(2.0, noise_scale=2 * NOISE)
        return moves + train(optimizer, 3)

    assert run(interrupted=True) == run(interrupted=False)
