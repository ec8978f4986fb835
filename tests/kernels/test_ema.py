"""Averages as a kernel: exact ends, launches, tensors as decays, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness import launches
from torch import Tensor

from lightning_ext import functional, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _lists(count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    averages, values = [
        [torch.randn(7, i + 1, device=DEVICE) for i in range(count)] for _ in range(2)
    ]
    return averages, values


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("in_tensor", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_a_decay_of_one_leaves_every_bit(in_tensor: bool, value: float) -> None:
    average = torch.tensor([-0.0, math.inf, 1.1], device=DEVICE)
    before = average.view(torch.int32).clone()
    decay = torch.tensor(1.0, device=DEVICE) if in_tensor else 1.0
    with np.errstate(invalid="ignore"):  # the interpreter is numpy
        kernels.ema_update_([average], [torch.full_like(average, value)], decay, fused=True)
    assert torch.equal(average.view(torch.int32), before)


@pytest.mark.parametrize("in_tensor", [False, True])
def test_a_decay_of_zero_copies(in_tensor: bool) -> None:
    average = torch.tensor([math.nan, math.inf, 1.1], device=DEVICE)
    value = torch.tensor([2.0, -1.0, 3.3], device=DEVICE)
    decay = torch.tensor(0.0, device=DEVICE) if in_tensor else 0.0
    with np.errstate(invalid="ignore"):
        kernels.ema_update_([average], [value], decay, fused=True)
    assert torch.equal(average, value)


@pytest.mark.parametrize(("decays", "expected"), [(1, 1), (4, 1), (5, 2)])
def test_four_decays_of_all_tensors_are_one_launch(decays: int, expected: int) -> None:
    averages, values = _lists()
    several = [[x.clone() for x in averages] for _ in range(decays)]
    with launches() as found:
        kernels.ema_update_(several, values, [0.9] * decays, fused=True)
    assert len(found) == expected


def test_numbers_and_tensors_may_be_mixed() -> None:
    averages, values = _lists()
    several, expected = ([[x.clone() for x in averages] for _ in range(2)] for _ in range(2))
    kernels.ema_update_(several, values, [0.75, torch.tensor(0.5, device=DEVICE)], fused=True)
    for one, decay in zip(expected, (0.75, 0.5), strict=True):
        functional.ema_update_(one, values, decay)
    torch.testing.assert_close(several, expected)


def test_a_decay_near_one_keeps_its_digits() -> None:
    average, value = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    for decay in (1 - 1e-6, torch.tensor(1 - 1e-6, dtype=torch.float64, device=DEVICE)):
        average.zero_()
        kernels.ema_update_([average], [value], decay, fused=True)
        assert average.item() == pytest.approx(1e-6, rel=1e-6)


def test_nothing_to_average_launches_nothing() -> None:
    with launches() as found:
        kernels.ema_update_([], [], 0.9, fused=True)
        kernels.ema_update_([torch.ones(0)], [torch.ones(0)], 0.9, fused=True)
    assert found == []


def test_parameters_are_averaged_without_a_gradient() -> None:
    module = torch.nn.Linear(3, 2, device=DEVICE)
    averages = [torch.zeros_like(x) for x in module.parameters()]
    for fused in (None, True, False):
        kernels.ema_update_(averages, list(module.parameters()), 0.5, fused=fused)
    assert not any(x.requires_grad for x in averages)


@pytest.mark.parametrize(
    ("averages", "values", "decay", "error", "match"),
    [
        ([torch.ones(2)], [], 0.9, ValueError, "1 averages and 0 values"),
        ([torch.ones(2)], [torch.ones(3)], 0.9, ValueError, "average 0 has shape"),
        ([torch.ones(2)], [torch.ones(2)], 1.5, ValueError, "must lie in"),
        ([torch.ones(2).bfloat16()], [torch.ones(2).bfloat16()], 0.9, TypeError, "rounded away"),
        ([torch.ones(2)], [torch.ones(2)], [0.9, 0.5], ValueError, "2 decays need"),
        ([torch.ones(2).double()], [torch.ones(2)], 0.9, TypeError, "float64"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int64)], 0.9, TypeError, "copy them"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_launch(
    averages: list[Tensor], values: list[Tensor], decay: float, error: type, match: str
) -> None:
    averages, values = [x.to(DEVICE) for x in averages], [x.to(DEVICE) for x in values]
    with launches() as found, pytest.raises(error, match=match):
        kernels.ema_update_(averages, values, decay, fused=True)
    assert found == []


def test_double_precision_is_left_to_torch() -> None:
    averages, values = ([x.double() for x in each] for each in _lists())
    expected = [x.clone() for x in averages]
    torch._foreach_lerp_(expected, values, 1 - 0.9)
    with launches() as found:
        kernels.ema_update_(averages, values, 0.9)
    assert found == []
    assert _equal(averages, expected)


def test_other_data_in_a_known_tensor_is_noticed() -> None:
    averages = [torch.zeros(4), torch.zeros(64)]
    values = [torch.ones(4), torch.ones(64)]
    kernels.ema_update_(averages, values, 0.5, fused=True)
    buffer = torch.zeros(64)
    averages[1].data = buffer[:2]
    with launches() as found, pytest.raises(ValueError, match="they must agree"):
        kernels.ema_update_(averages, values, 0.5, fused=True)
    assert found == []
    assert not buffer.any()
