"""Normalization kernels: norms at no other launch, determinism, far rows, and where they refuse."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_accurate, launches
from torch import Tensor

from lightning_ext.kernels import layer_norm, rms_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _layer(x: Tensor, *given: Any, **options: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], *given, **options)


def _rms(x: Tensor, *given: Any, eps: float = 1e-6, **options: Any) -> Tensor:
    return rms_norm(x, x.shape[-1:], *given, eps=eps, **options)


NORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "layer_norm": (_layer, 2),
    "rms_norm": (_rms, 1),
}
every_norm = pytest.mark.parametrize("name", NORMS)


def inputs(
    name: str, *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()
    given = torch.randn(NORMS[name][1], shape[-1], dtype=dtype, device=DEVICE)
    return x, [p.requires_grad_() for p in given]


def zeros(given: list[Tensor], samples: int) -> Tensor:
    return torch.zeros(len(given), samples, device=DEVICE)


@every_norm
def test_norms_take_no_other_launch_than_the_gradients(name: str) -> None:
    found: list[list[str]] = []
    x, given = inputs(name, 3, 20, 16)
    for into in (None, zeros(given, 3)):
        with launches() as names:
            NORMS[name][0](x, *given, sample_sq_norms=into, fused=True).sum().backward()
        found.append(names)
    assert (
        found[0] == found[1] == ["norm_forward_kernel", "norm_backward_kernel", "norm_sums_kernel"]
    )


@every_norm
def test_frozen_parameters_leave_nothing_to_add_up(name: str) -> None:
    x, given = inputs(name, 3, 20, 16)
    with launches() as found:
        NORMS[name][0](x, *(p.detach() for p in given), fused=True).sum().backward()
    assert found == ["norm_forward_kernel", "norm_backward_kernel"]


@every_norm
def test_norms_of_frozen_parameters_are_had_as_well(name: str) -> None:
    x, given = inputs(name, 3, 20, 16)
    found, expected = zeros(given, 3), zeros(given, 3)
    frozen = [p.detach() for p in given]
    NORMS[name][0](x, *frozen, sample_sq_norms=found, fused=True).sum().backward()
    NORMS[name][0](x, *given, sample_sq_norms=expected, fused=True).sum().backward()
    assert found.equal(expected)
    assert found.gt(0).all()


def penalty(norm: Callable[..., Tensor], x: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the squared size of the gradient of a loss."""
    loss = norm(x, *given).sin().sum()
    first = torch.autograd.grad(loss, [x, *given], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *given])


@every_norm
def test_gradients_have_gradients(name: str) -> None:
    x, given = inputs(name, 3, 5, 16)
    found = penalty(lambda *args: NORMS[name][0](*args, fused=True), x, given)
    wide = [t.detach().double().requires_grad_() for t in (x, *given)]
    for mine, truth in zip(found, penalty(NORMS[name][0], wide[0], wide[1:]), strict=True):
        assert_accurate(mine, truth)


@every_norm
def test_gradients_of_x_alone_have_gradients(name: str) -> None:
    x = inputs(name, 3, 5, 16)[0]
    wide = x.detach().double().requires_grad_()
    found, truth = (
        penalty(lambda x, fused=fused: NORMS[name][0](x, None, fused=fused), given, [])
        for given, fused in ((x, True), (wide, False))
    )
    assert_accurate(found[0], truth[0])


@every_norm
def test_with_norms_gradients_of_a_linear_loss_are_refused_as_well(name: str) -> None:
    x, given = inputs(name, 2, 3, 8)
    y = NORMS[name][0](x, *given, sample_sq_norms=zeros(given, 2), fused=True)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_norm
def test_two_runs_are_the_same_to_the_bit(name: str) -> None:
    x, given = inputs(name, 2, 70, 24)
    d, results = torch.randn_like(x), []
    for _ in range(2):
        into = zeros(given, 2)
        y = NORMS[name][0](x, *given, sample_sq_norms=into, fused=True)
        results.append([*torch.autograd.grad(y, [x, *given], d), into])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@every_norm
@pytest.mark.parametrize("shape", [(3, 20, 16), (40, 16)])
def test_norms_are_added_to_what_is_there(name: str, shape: tuple[int, ...]) -> None:
    x, given = inputs(name, *shape)
    found = zeros(given, shape[0]) + 1
    y = NORMS[name][0](x, *given, sample_sq_norms=found, fused=True)
    y.sum().backward(retain_graph=True)
    once = found - 1
    y.sum().backward()
    torch.testing.assert_close(found, 1 + 2 * once)


@every_norm
def test_rows_of_a_wider_matrix_are_read_where_they_are(name: str) -> None:
    wide, given = torch.randn(6, 3 * 16, device=DEVICE), inputs(name, 1, 16)[1]
    x = wide[:, 16:32]
    y = NORMS[name][0](x, *given, fused=True)
    assert y.equal(NORMS[name][0](x.contiguous(), *given, fused=True))


@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="the memory is 8 GiB of untouched pages of the host"
)
@every_norm
@pytest.mark.parametrize("stride", [2**27, 2**30], ids=["read in place", "copied"])
def test_rows_are_found_beyond_two_to_the_31_entries(name: str, stride: int) -> None:
    rows = 2**31 // stride + 1
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (2**31 + 1024)), dtype=torch.float32)
    x = memory.as_strided((rows, 600), (stride, 1))
    x.copy_(torch.randn(x.shape))
    given = inputs(name, 1, 600)[1]
    expected = NORMS[name][0](x.contiguous(), *given, fused=True)
    assert NORMS[name][0](x, *given, fused=True).equal(expected)
    x, close = x.detach().requires_grad_(), x.contiguous().detach().requires_grad_()
    found, expected = torch.zeros(2, len(given), rows).unbind()
    NORMS[name][0](x, *given, sample_sq_norms=found, fused=True).sum().backward()
    NORMS[name][0](close, *given, sample_sq_norms=expected, fused=True).sum().backward()
    assert found.equal(expected)


@every_norm
def test_a_gradient_that_is_broadcast_is_read(name: str) -> None:
    x, given = inputs(name, 2, 3, 8, dtype=torch.float32)
    y = NORMS[name][0](x, *given, fused=True)
    (found,) = torch.autograd.grad(y.sum(), x)
    wide = [t.detach().double().requires_grad_() for t in (x, *given)]
    truth = torch.autograd.grad(NORMS[name][0](*wide, fused=False).sum(), wide[0])[0]
    assert_accurate(found, truth)


# Dynamo makes an instance of every autograd.Function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_norm
def test_it_compiles_as_one_graph(name: str) -> None:
    x, given = inputs(name, 3, 5, 8)
    eager, compiled = zeros(given, 3), zeros(given, 3)
    run = torch.compile(NORMS[name][0], fullgraph=True, backend="aot_eager")
    NORMS[name][0](x, *given, sample_sq_norms=eager, fused=False).sum().backward()
    run(x, *given, sample_sq_norms=compiled).sum().backward()
    torch.testing.assert_close(compiled, eager)


@every_norm
def test_it_composes_with_transforms(name: str) -> None:
    x, given = inputs(name, 3, 5, 8, dtype=torch.float64)
    found = torch.vmap(torch.func.grad(lambda x: NORMS[name][0](x, *given).square().sum()))(x)
    (expected,) = torch.autograd.grad(NORMS[name][0](x, *given).square().sum(), x)
    assert_accurate(found, expected)


X = torch.zeros(3, 2, 4)
W = torch.zeros(4)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "another width": ((X, torch.zeros(5)), {}, ValueError, r"it must have shape \(4,\)"),
    "another device": ((X, W.to("meta")), {}, ValueError, "on the device of x"),
    "narrower": ((X, W.half()), {}, TypeError, "as x is, or wider"),
    "double": ((X.double(), W.double()), {}, TypeError, "does not take torch.float64"),
    "samples": ((X, W), {"sample_sq_norms": torch.zeros(1, 2)}, ValueError, r"shape \(1, 3\)"),
    "dtype": ((X, W), {"sample_sq_norms": torch.zeros(1, 3).half()}, TypeError, "float32"),
}


@every_norm
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_before_a_launch(name: str, case: str) -> None:
    given, options, error, message = WRONG[case]
    with launches() as found, pytest.raises(error, match=message):
        NORMS[name][0](
            *(t.to(DEVICE) if t.device.type == "cpu" else t for t in given), **options, fused=True
        )
    assert found == []


def test_several_dimensions_are_normalized_together() -> None:
    x, weight = torch.randn(3, 5, 2, 4, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    expected = torch.nn.functional.layer_norm(x, (2, 4), weight)
    torch.testing.assert_close(layer_norm(x, (2, 4), weight, fused=True), expected)
    expected = torch.nn.functional.rms_norm(x, (2, 4), weight)
    torch.testing.assert_close(rms_norm(x, (2, 4), weight, fused=True), expected)
