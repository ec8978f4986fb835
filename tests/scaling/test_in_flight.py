"""A change of the batch in the middle of a run with torch's own Adam."""

from __future__ import annotations

import pytest
import torch

from lightning_ext.scaling import scale_hyperparameters, scale_step_count

CLASSES = [torch.optim.Adam, torch.optim.AdamW]
GRADIENT = 0.5


def _train(optimizer: torch.optim.Optimizer, steps: int) -> None:
    (parameter,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, GRADIENT)
        optimizer.step()


def _second_moment(optimizer: torch.optim.Optimizer) -> float:
    """Return Adam's bias-corrected second moment, in float64."""
    (group,) = optimizer.param_groups
    state = optimizer.state[group["params"][0]]
    correction = 1 - group["betas"][1] ** state["step"].item()
    return state["exp_avg_sq"].item() / correction


def _switched(cls: type[torch.optim.Optimizer], kappa: float, *, restate_step: bool):
    """Train 50 steps with a constant gradient, change the batch by κ, and train one more step."""
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = cls([parameter], lr=1e-3, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    _train(optimizer, 50)
    state, (group,) = optimizer.state[parameter], optimizer.param_groups
    assert state["step"].dtype == torch.float32
    scaled = scale_hyperparameters(kappa, rule="sde", lr=group["lr"], betas=group["betas"])
    group["lr"], group["betas"] = scaled.lr, scaled.betas
    if restate_step:
        state["step"].copy_(scale_step_count(state["step"], kappa))
    return optimizer


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kappa", [0.25, 2, 3, 16])
def test_the_second_moment_goes_on_as_if_nothing_had_happened(cls, kappa) -> None:
    optimizer = _switched(cls, kappa, restate_step=True)
    assert _second_moment(optimizer) == pytest.approx(GRADIENT**2, rel=1e-6)
    _train(optimizer, 5)
    assert _second_moment(optimizer) == pytest.approx(GRADIENT**2, rel=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kappa", [0.25, 2, 3, 16])
def test_without_restating_the_step_it_is_off_by_more_than_1_percent(cls, kappa) -> None:
    optimizer = _switched(cls, kappa, restate_step=False)
    assert abs(_second_moment(optimizer) / GRADIENT**2 - 1) > 0.01
    _train(optimizer, 1)
    assert abs(_second_moment(optimizer) / GRADIENT**2 - 1) > 0.01


@pytest.mark.parametrize("cls", CLASSES)
def test_the_step_after_the_switch_has_the_length_of_the_learning_rate(cls) -> None:
    lengths = []
    for restate_step in (True, False):
        optimizer = _switched(cls, 4, restate_step=restate_step)
        (group,) = optimizer.param_groups
        before = group["params"][0].item()
        _train(optimizer, 1)
        lengths.append((before - group["params"][0].item()) / group["lr"])
    assert lengths[0] == pytest.approx(1, rel=1e-6)
    assert lengths[1] > 1.5
