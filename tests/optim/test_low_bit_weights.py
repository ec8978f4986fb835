"""Weights in bfloat16 that keep small steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.low_bit_cases import CLASSES, Steps, same
from torch.nn import Parameter

from lightning_ext.functional import join_weight
from lightning_ext.optim import LowBitAdamW

ROUNDED = ["LowBitAdamW", "Lion", "LAMB", "LARS", "AdamP"]
every = pytest.mark.parametrize("name", ROUNDED)


def descent(weight_rounding: str, **how: Any) -> torch.Tensor:
    """200 steps of 1e-4 from 1, whose last place in bfloat16 is 0.0039 below and 0.0078 above."""
    weight = Parameter(torch.ones(40, 50, dtype=torch.bfloat16))
    settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "min_quantized_numel": 0} | how
    optimizer = LowBitAdamW([weight], weight_rounding=weight_rounding, **settings)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    if weight_rounding == "compensated":
        return join_weight(weight.detach(), optimizer.state[weight]["weight_error"])
    return weight.detach().float()


def test_to_nearest_small_steps_are_lost() -> None:
    assert (descent("nearest") == 1).all()


def test_at_random_small_steps_are_kept_in_the_mean() -> None:
    found = descent("stochastic")
    assert abs(found.mean().item() - 0.98) < 4 * found.std().item() / 2000**0.5
    assert found.std() > 0


def test_with_errors_kept_the_weight_is_that_of_24_bits() -> None:
    found = descent("compensated")
    torch.testing.assert_close(found, torch.full_like(found, 0.98), rtol=0, atol=200 * 2.0**-17)


@every
def test_weight_and_error_follow_float32(name: str) -> None:
    """The gradients are those of the weights in bfloat16, so they are given to both."""
    run = Steps(name, torch.bfloat16, state_dtype="float32", weight_rounding="compensated")
    wide = Steps(name, state_dtype="float32")
    start = [p.detach().float().abs() for p in run.params]
    with torch.no_grad():
        for p, q in zip(wide.params, run.params, strict=True):
            p.copy_(q)
    for _ in range(3):
        run.give()
        for p, q in zip(wide.params, run.params, strict=True):
            p.grad = None if q.grad is None else q.grad.float()
        run.optimizer.step()
        wide.optimizer.step()
        run.taken += 1
    for p, q, first in zip(wide.params[:-1], run.params, start, strict=False):
        whole = join_weight(q.detach(), run.optimizer.state[q]["weight_error"])
        bound = 3 * 2.0**-16 * p.detach().abs().maximum(first) + 1e-6
        assert ((whole - p.detach()).abs() <= bound).all()


@every
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, rounding: str, format: str | None
) -> None:
    how: dict[str, Any] = {"state_dtype": format, "weight_rounding": rounding, "seed": 3}
    first = Steps(name, torch.bfloat16, **how).run(3)
    second = Steps(name, torch.bfloat16, **how).resume(first)
    assert same(first.run(3), second.run(3))


@every
def test_another_seed_rounds_otherwise_and_the_same_seed_alike(name: str) -> None:
    how: dict[str, Any] = {"weight_rounding": "stochastic"}
    a, b, c = (Steps(name, torch.bfloat16, seed=x, **how).run(2) for x in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)


@every
def test_errors_are_for_weights_in_bfloat16(name: str) -> None:
    with pytest.raises(TypeError, match=r'"compensated" is for weights in torch\.bfloat16'):
        Steps(name, weight_rounding="compensated").run(1)


@every
def test_a_name_that_no_rounding_has_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"weight_rounding='up'.*'stochastic', 'compensated'"):
        Steps(name, weight_rounding="up")


def test_checkpoints_with_and_without_errors_are_loaded_into_each_other() -> None:
    kept = Steps("LowBitAdamW", torch.bfloat16, weight_rounding="compensated").run(2)
    plain = Steps("LowBitAdamW", torch.bfloat16).resume(kept).run(1)
    back = Steps("LowBitAdamW", torch.bfloat16, weight_rounding="compensated").resume(plain)
    assert back.run(1).weights().isfinite().all()


def test_all_classes_that_round_weights_are_classes_of_the_list() -> None:
    assert set(ROUNDED) <= set(CLASSES)
