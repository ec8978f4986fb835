"""Squared norms as a kernel: order, launches, large lists, transforms, what is refused."""

from __future__ import annotations

import pytest
import torch
from harness import assert_accurate, launches

from lightning_ext import functional, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_result_is_the_same_in_every_bit_at_every_call() -> None:
    tensors = [torch.randn(9000, device=DEVICE) for _ in range(5)]
    once, again = (kernels.sq_norms(tensors, [0, 1, 0, 1, 0], fused=True) for _ in range(2))
    assert torch.equal(once, again)


def test_groups_need_not_be_in_order() -> None:
    tensors = [torch.full((3,), float(i), device=DEVICE) for i in range(5)]
    found = kernels.sq_norms(tensors, [3, 0, 3, 1, 0], fused=True)
    assert found.tolist() == [3 * (1 + 16), 3 * 9, 0, 3 * (0 + 4)]


def test_all_tensors_and_groups_are_two_launches() -> None:
    tensors = [torch.randn(5, device=DEVICE) for _ in range(7)]
    with launches() as found:
        kernels.sq_norms(tensors, range(7), fused=True)
        kernels.accumulated_sq_norms_(tensors, [x.clone() for x in tensors], fused=True)
    assert found == ["sq_norms_kernel", "group_sums_kernel"] * 2


def test_many_entries_keep_their_digits() -> None:
    tensors = [torch.randn(300_000, device=DEVICE), torch.randn(1, device=DEVICE)]
    truth = functional.sq_norms([x.double() for x in tensors]).cpu()
    assert_accurate(kernels.sq_norms(tensors, fused=True), truth)


@pytest.mark.parametrize("fused", [None, True])
def test_a_missing_gradient_counts_as_zero_and_keeps_its_group(fused: bool | None) -> None:
    x = torch.tensor([3.0, 4.0], device=DEVICE)
    assert kernels.sq_norms([x, None], [0, 2], fused=fused).tolist() == [25, 0, 0]
    assert kernels.diff_sq_norms([x, None], [None, x], [0, 2], fused=fused).tolist() == [25, 0, 25]


def test_nothing_at_all_is_zero() -> None:
    for fused in (None, True, False):
        assert kernels.sq_norms([], fused=fused) == 0
        assert kernels.sq_norms([None], [1], fused=fused).tolist() == [0, 0]
        assert kernels.accumulated_sq_norms([], [], fused=fused).tolist() == [0, 0, 0]
        assert kernels.unit_norms([], fused=fused) == []


def test_the_sum_takes_the_place_of_what_was_there_before() -> None:
    accumulated = [torch.randn(3, 5, device=DEVICE).T, torch.randn(9000, device=DEVICE), None]
    before = [torch.randn(5, 3, device=DEVICE), torch.randn(9000, device=DEVICE), None]
    expected = functional.accumulated_sq_norms(accumulated, before, [0, 1, 1])
    found = kernels.accumulated_sq_norms_(accumulated, before, [0, 1, 1], fused=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(before[0], accumulated[0])
    assert torch.equal(before[1], accumulated[1])


def test_on_a_cpu_gradients_and_maps_go_through() -> None:
    x = torch.randn(4, 3)
    gradient = torch.func.grad(lambda y: kernels.sq_norms([y]))(x)
    torch.testing.assert_close(gradient, 2 * x)
    found = torch.func.vmap(lambda y: kernels.diff_sq_norms([y], [0 * y]))(x)
    torch.testing.assert_close(found, x.square().sum(1))
    found = torch.func.vmap(lambda y: kernels.unit_norms([y])[0])(x)
    torch.testing.assert_close(found, x.norm(dim=1, keepdim=True))


def test_the_gradient_of_a_kernel_reaches_only_what_needs_it() -> None:
    x, y = torch.randn(5, device=DEVICE, requires_grad=True), torch.randn(5, device=DEVICE)
    kernels.diff_sq_norms([x], [y], fused=True).backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - y))
    assert y.grad is None


def test_a_tensor_that_is_given_twice_gets_both_gradients() -> None:
    x = torch.randn(5, device=DEVICE, requires_grad=True)
    kernels.sq_norms([x, x], fused=True).backward()
    torch.testing.assert_close(x.grad, 4 * x.detach())


def test_a_kernel_has_a_second_derivative() -> None:
    x = torch.randn(5, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels.sq_norms([x], fused=True), x, create_graph=True)
    gradient.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2] * 5


@pytest.mark.parametrize(
    ("op", "lists"),
    [
        (kernels.sq_norms, 1),
        (kernels.diff_sq_norms, 2),
        (kernels.accumulated_sq_norms, 2),
        (kernels.accumulated_sq_norms_, 2),
        (kernels.unit_norms, 1),
    ],
)
def test_double_precision_as_a_kernel_is_refused_before_any_launch(op: object, lists: int) -> None:
    assert callable(op)
    x = torch.ones(2, dtype=torch.float64, device=DEVICE)
    with launches() as found, pytest.raises(TypeError, match="float64"):
        op(*[[x]] * lists, fused=True)
    assert found == []


@pytest.mark.parametrize("op", [kernels.diff_sq_norms, kernels.accumulated_sq_norms_])
def test_lists_that_do_not_fit_are_refused_before_any_launch(op: object) -> None:
    assert callable(op)
    x = torch.ones(2, device=DEVICE)
    for arguments, match in (([[x], []], "in pairs"), ([[x], [x], [0, 1]], "one group")):
        with launches() as found, pytest.raises(ValueError, match=match):
            op(*arguments, fused=True)
        assert found == []
