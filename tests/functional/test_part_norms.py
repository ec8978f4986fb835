"""Squared norms: dtypes, holes, groups and refusals."""

from __future__ import annotations

import pytest
import torch

from lightning_ext.functional import part_sq_norms, sq_norms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((4096,), 64.0, dtype=dtype)
    got = sq_norms([x])
    assert got.dtype == torch.float32
    assert got == 4096 * 64.0**2  # beyond the largest float16


def test_float64_stays_float64_next_to_float32() -> None:
    got = sq_norms([torch.ones(2), torch.full((1,), 1e-9, dtype=torch.float64)])
    assert got.dtype == torch.float64


def test_the_default_dtype_does_not_leak_in() -> None:
    torch.set_default_dtype(torch.float64)
    assert sq_norms([torch.ones(2, dtype=torch.float32)]).dtype == torch.float32


def test_complex_entries_count_real_and_imaginary_part() -> None:
    assert sq_norms([torch.tensor([3 + 4j])]) == 25


def test_gradient_at_zero_is_zero() -> None:
    x = torch.zeros(3, requires_grad=True)
    sq_norms([x]).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0]


def test_a_missing_gradient_counts_as_zero_and_keeps_its_group() -> None:
    assert sq_norms([torch.ones(2), None], [0, 2]).tolist() == [2, 0, 0]


def test_nothing_at_all_is_zero() -> None:
    assert sq_norms([]) == 0
    assert sq_norms([None]) == 0
    assert sq_norms([], []).shape == (0,)


def test_non_contiguous_entries_are_all_counted() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert sq_norms([x.t(), x[:, ::2]]) == x.square().sum() + x[:, ::2].square().sum()


def test_parts_have_one_row_each() -> None:
    parts = [[torch.ones(2), torch.ones(3)] for _ in range(4)]
    assert part_sq_norms(parts).shape == (4,)
    assert part_sq_norms(parts, [0, 1]).tolist() == [[2, 3]] * 4


@pytest.mark.parametrize("groups", [[0], [0, 1, 2], [0, -1]])
def test_groups_that_do_not_fit_are_refused(groups: list[int]) -> None:
    with pytest.raises(ValueError, match="one group"):
        sq_norms([torch.ones(1), torch.ones(1)], groups)


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        part_sq_norms([])


MIXED = [
    torch.arange(6.0).reshape(2, 3).t(),
    None,
    torch.full((70_000,), 1.5),
    torch.tensor(3.0, dtype=torch.float64),
    torch.full((3,), 256.0, dtype=torch.float16),
    torch.tensor([3 + 4j]),
    torch.zeros(0),
]


@pytest.mark.parametrize("groups", [None, [0, 0, 2, 2, 1, 1, 4]])
def test_tensors_taken_together_have_the_same_norms(groups: list[int] | None) -> None:
    one, other = sq_norms(MIXED, groups, foreach=True), sq_norms(MIXED, groups)
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_taken_together_they_agree_in_float64_to_the_last_digits() -> None:
    tensors = [torch.randn(n, dtype=torch.float64) for n in (3, 1000, 70_000)]
    torch.testing.assert_close(
        sq_norms(tensors, foreach=True), sq_norms(tensors), rtol=1e-13, atol=0
    )


def test_many_small_entries_are_not_lost_behind_a_large_sum() -> None:
    x = torch.full((5_000_000,), 1.0)
    torch.testing.assert_close(sq_norms([x], foreach=True).item(), 5e6, rtol=1e-4, atol=0)


def test_nothing_taken_together_is_zero() -> None:
    assert sq_norms([], foreach=True) == 0
    assert sq_norms([None], [1], foreach=True).tolist() == [0, 0]
