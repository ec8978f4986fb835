"""Squared norms of differences and of accumulated gradients: dtypes, holes, digits, refusals."""

from __future__ import annotations

import pytest
import torch
from harness import assert_accurate
from torch import Tensor

from lightning_ext.functional import (
    accumulated_sq_norms,
    accumulated_sq_norms_,
    diff_sq_norms,
    sq_norms,
)

MIXED = [
    torch.arange(6.0).reshape(2, 3).t(),
    None,
    torch.linspace(-1, 1, 300_000),
    torch.tensor(3.0, dtype=torch.float64),
    torch.full((3,), 256.0, dtype=torch.float16),
    torch.tensor([3 + 4j]),
    torch.zeros(0),
    None,
]
OTHERS = [
    torch.ones(3, 2),
    torch.ones(2),
    torch.zeros(300_000, dtype=torch.bfloat16),
    None,
    torch.zeros(3),
    torch.tensor([1j]),
    torch.zeros(0),
    None,
]
GROUPS = [0, 0, 2, 2, 1, 1, 4, 5]


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_taken_together_differences_have_the_same_norms(groups: list[int] | None) -> None:
    one = diff_sq_norms(MIXED, OTHERS, groups, foreach=True)
    other = diff_sq_norms(MIXED, OTHERS, groups)
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_taken_together_sums_tell_the_same(groups: list[int] | None) -> None:
    one = accumulated_sq_norms(MIXED, OTHERS, groups, foreach=True)
    other = accumulated_sq_norms(MIXED, OTHERS, groups)
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
def test_nothing_at_all_is_zero(foreach: bool) -> None:
    assert diff_sq_norms([], [], foreach=foreach) == 0
    assert diff_sq_norms([None], [None], [1], foreach=foreach).tolist() == [0, 0]
    assert accumulated_sq_norms([], [], foreach=foreach).tolist() == [0, 0, 0]
    assert accumulated_sq_norms([], [], [], foreach=foreach).shape == (3, 0)


def test_small_differences_of_large_numbers_keep_their_digits() -> None:
    x = torch.full((1000,), 1024.0)
    y = x + 2**-12
    assert diff_sq_norms([y], [x], foreach=True) == 1000 * 2.0**-24
    assert sq_norms([y]) - sq_norms([x]) != 1000 * 2.0**-24


@pytest.mark.parametrize("foreach", [False, True])
def test_many_entries_keep_their_digits(foreach: bool) -> None:
    x, y = torch.randn(3_000_000), torch.randn(3_000_000)
    found = accumulated_sq_norms([x], [y], foreach=foreach)
    truth = accumulated_sq_norms([x.double()], [y.double()], foreach=foreach)
    assert_accurate(found, truth)


def _signal_left(parts: list[Tensor]) -> tuple[float, float]:
    """Σ⟨g_j, G_{j−1}⟩ in float32, from the products and from the squared norms."""
    before, total = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    rows = []
    for part in parts:
        total = total + part
        rows.append(accumulated_sq_norms_([total], [before]))
    part, whole, product = torch.stack(rows).T
    return product.sum().item(), ((whole[-1] - part.sum()) / 2).item()


def test_products_lose_less_than_the_difference_of_squares() -> None:
    # The parts but the first two are orthogonal: almost all of the squares cancels.
    parts = [torch.zeros(40_000) for _ in range(40)]
    for j, part in enumerate(parts):
        part[1000 * j : 1000 * (j + 1)] = torch.randn(1000)
    parts[1][:1000] = 1e-4 * parts[0][:1000]
    exact = sum(
        torch.dot(x.double(), y.double()).item() for j, x in enumerate(parts) for y in parts[:j]
    )
    product, difference = _signal_left(parts)
    assert abs(product / exact - 1) < 0.02
    assert abs(difference / exact - 1) > 5 * abs(product / exact - 1)


def test_in_place_the_sum_becomes_what_was_there_before() -> None:
    accumulated = [torch.ones(2), None, torch.ones(3, dtype=torch.bfloat16)]
    before = [torch.zeros(2), torch.ones(1), torch.zeros(3)]
    accumulated_sq_norms_(accumulated, before)
    assert [x.tolist() for x in before] == [[1, 1], [0], [1, 1, 1]]


@pytest.mark.parametrize("op", [diff_sq_norms, accumulated_sq_norms, accumulated_sq_norms_])
def test_lists_that_do_not_fit_are_refused(op: object) -> None:
    assert callable(op)
    with pytest.raises(ValueError, match="in pairs"):
        op([torch.ones(1)], [])
    with pytest.raises(ValueError, match="pair 0 has shape"):
        op([torch.ones(1)], [torch.ones(2)])
    with pytest.raises(ValueError, match="one group"):
        op([torch.ones(1)], [torch.ones(1)], [0, 1])


def test_a_copy_that_would_lose_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="too narrow"):
        accumulated_sq_norms_([torch.ones(1)], [torch.ones(1, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="give it zeros"):
        accumulated_sq_norms_([torch.ones(1)], [None])
