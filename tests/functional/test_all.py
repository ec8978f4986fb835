"""The contract of the room: gradcheck, a hand-worked value, an invariance, a second opinion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import part_sq_norms, sq_norms

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
GROUPS = [1, 0, 1, 3]


def _tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def _parts(count: int = 3) -> list[list[Tensor]]:
    return [_tensors() for _ in range(count)]


def _grad_sq_norms() -> bool:
    inputs = tuple(x.requires_grad_() for x in [*_tensors(), torch.zeros(2, dtype=torch.float64)])
    whole = torch.autograd.gradcheck(lambda *x: sq_norms(x), inputs)
    return whole and torch.autograd.gradcheck(lambda *x: sq_norms(x, [*GROUPS, 2]), inputs)


def _grad_part_sq_norms() -> bool:
    inputs = tuple(x.requires_grad_() for part in _parts(2) for x in part)
    return torch.autograd.gradcheck(
        lambda *x: part_sq_norms([x[: len(SHAPES)], x[len(SHAPES) :]], GROUPS), inputs
    )


def _hand_sq_norms() -> tuple[Tensor, list[float]]:
    return sq_norms([torch.tensor([3.0, 4.0]), None, torch.tensor(-2.0)], [0, 2, 3]), [25, 0, 0, 4]


def _hand_part_sq_norms() -> tuple[Tensor, list[float]]:
    return part_sq_norms([[torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 2.0])]]), [25, 5]


def _rotation_sq_norms() -> tuple[Tensor, Tensor]:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    x = torch.randn(5, dtype=torch.float64)
    return sq_norms([rotation @ x]), sq_norms([x])


def _sum_of_groups_part_sq_norms() -> tuple[Tensor, Tensor]:
    parts = _parts()
    return part_sq_norms(parts, GROUPS).sum(dim=1), part_sq_norms(parts)


def _numpy_sq_norms() -> tuple[Tensor, list[float]]:
    tensors = _tensors()
    return sq_norms(tensors), float(sum(np.linalg.norm(x.numpy()) ** 2 for x in tensors))


def _flat_part_sq_norms() -> tuple[Tensor, Tensor]:
    parts = _parts()
    flat = torch.stack([torch.cat([x.flatten() for x in part]) for part in parts])
    return part_sq_norms(parts), torch.einsum("ki,ki->k", flat, flat)


@dataclass(frozen=True)
class Contract:
    gradcheck: Callable[[], bool]
    by_hand: Callable[[], tuple]
    invariance: Callable[[], tuple]
    independent: Callable[[], tuple]


CONTRACTS = {
    "sq_norms": Contract(_grad_sq_norms, _hand_sq_norms, _rotation_sq_norms, _numpy_sq_norms),
    "part_sq_norms": Contract(
        _grad_part_sq_norms,
        _hand_part_sq_norms,
        _sum_of_groups_part_sq_norms,
        _flat_part_sq_norms,
    ),
}

every_function = pytest.mark.parametrize("name", functional.__all__)


def test_the_table_of_contents_is_sorted_and_has_no_strangers() -> None:
    assert functional.__all__ == sorted(CONTRACTS)


@every_function
def test_gradient_agrees_with_finite_differences_in_float64(name: str) -> None:
    assert CONTRACTS[name].gradcheck()


@every_function
def test_value_worked_by_hand(name: str) -> None:
    got, expected = CONTRACTS[name].by_hand()
    assert got.tolist() == expected


@every_function
def test_invariance(name: str) -> None:
    got, expected = CONTRACTS[name].invariance()
    torch.testing.assert_close(got, expected)


@every_function
def test_independent_implementation(name: str) -> None:
    got, expected = CONTRACTS[name].independent()
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype))
