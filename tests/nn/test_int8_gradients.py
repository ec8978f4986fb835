"""Gradients of weights of 8 bits, what is kept for them, and who finds them in ``grad``."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import assert_accurate
from harness.int8_parts import int8_layer
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_ext.nn import Int8Linear, Int8Weight, convert_int8_linear, undo_int8_linear


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, autocast: bool = False
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), weight, bias]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = linear(leaves[0], weight, bias)
    out.backward(torch.sin(torch.arange(out.numel())).view(out.shape).to(out.dtype))
    return [out.detach(), *[leaf.grad for leaf in leaves if leaf is not None]]


@pytest.mark.parametrize("shape", [(300,), (7, 300), (2, 3, 300)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_the_numbers_that_the_codes_stand_for(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    layer = Int8Linear(300, 6, with_bias, dtype=torch.float64)
    plain = undo_int8_linear(copy.deepcopy(layer))
    found = _gradients(x, layer.weight, layer.bias)
    wanted = _gradients(x, plain.weight, plain.bias)
    for a, b in zip(found, wanted, strict=True):
        assert type(a) is Tensor
        assert_accurate(a, b)


def test_the_gradient_by_finite_differences_of_the_numbers() -> None:
    x = torch.randn(3, 40, dtype=torch.float64)
    weight = nn.Parameter(Int8Weight.of(torch.randn(2, 40, dtype=torch.float64)))
    linear(x, weight).pow(2).sum().backward()
    numbers = weight.dequantize()

    def loss(w: Tensor) -> Tensor:
        return (x @ w.t()).pow(2).sum()

    eps, found = 1e-6, torch.zeros_like(numbers)
    for i in range(numbers.numel()):
        moved = torch.zeros(numbers.numel(), dtype=torch.float64)
        moved[i] = eps
        moved = moved.view_as(numbers)
        found.view(-1)[i] = (loss(numbers + moved) - loss(numbers - moved)) / (2 * eps)
    torch.testing.assert_close(weight.grad, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_of_the_numbers(dtype: torch.dtype) -> None:
    layer = int8_layer(dtype=dtype)
    plain = undo_int8_linear(copy.deepcopy(layer))
    x = torch.randn(7, 300)
    found = _gradients(x, layer.weight, layer.bias, autocast=True)
    wanted = _gradients(x, plain.weight, plain.bias, autocast=True)
    assert found[0].dtype == torch.bfloat16
    assert [a.dtype for a in found] == [b.dtype for b in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_add_up_and_frozen_weights_have_none() -> None:
    layer, x = int8_layer(), torch.randn(4, 300)
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, 2 * once)
    frozen = convert_int8_linear(nn.Linear(300, 6).requires_grad_(False))
    assert not frozen.weight.requires_grad
    frozen(x.requires_grad_()).sum().backward()
    assert frozen.weight.grad is None
    assert x.grad is not None


def test_backward_refuses_numbers_that_have_changed_since() -> None:
    layer = int8_layer()
    out = layer(torch.randn(4, 300)).sum()
    layer.weight.requantize_(torch.randn(6, 300), seed=0, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_clipping_counts_its_gradient() -> None:
    layer, x = int8_layer(), torch.randn(4, 300)
    layer(x).pow(2).sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert grads[0].norm() > 0.9 * norm
    torch.testing.assert_close(nn.utils.clip_grad_norm_(layer.parameters(), 1.0), norm)
    torch.testing.assert_close(layer.weight.grad, grads[0] / (norm + 1e-6))


def test_a_gradient_scaler_unscales_its_gradient() -> None:
    layer, x = int8_layer(), torch.randn(4, 300)
    layer(x).sum().backward()
    wanted = layer.weight.grad.clone()
    layer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale(layer(x).sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(layer.weight.grad, wanted)


def test_nothing_of_the_size_of_the_numbers_is_kept_for_backward() -> None:
    layer, kept = int8_layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(1, 300))
    assert sum(x.nbytes for x in kept) == 4 * 300 + layer.weight.nbytes


def test_compiled_it_is_the_same() -> None:
    layer, x = int8_layer(), torch.randn(4, 300)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for step in range(2):
        layer.zero_grad()
        compiled(x).pow(2).sum().backward()
        found = layer.weight.grad.clone()
        layer.zero_grad()
        layer(x).pow(2).sum().backward()
        torch.testing.assert_close(found, layer.weight.grad)
        layer.weight.requantize_(torch.randn(6, 300), seed=0, step=step)
