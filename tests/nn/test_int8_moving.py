"""Modules with weights of 8 bits that change device and dtype."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.int8_parts import int8_layer, int8_weight, parts_of, same_codes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_ext.nn import Int8Linear, Int8Weight


def _trained() -> Int8Linear:
    """A layer with a gradient, and a graph, a weak reference and an optimizer that hold it."""
    layer = int8_layer()
    layer(torch.randn(2, 300)).sum().backward()
    layer.held = layer(torch.randn(2, 300)), weakref.ref(layer.weight), [layer.weight]
    return layer


def test_dtypes_and_devices_change_as_those_of_a_linear_layer() -> None:
    layer = int8_layer()
    codes = layer.weight.codes.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer(torch.randn(2, 300).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.weight.codes, codes)
    assert layer.weight.scales.dtype == torch.float32
    layer.to("meta")
    assert layer.weight.codes.is_meta
    assert layer.weight.scales.is_meta
    with pytest.raises(TypeError, match=r"torch\.int8 is not allowed"):
        int8_layer().weight.to(torch.int8)


def test_what_is_made_like_it_is_of_plain_numbers() -> None:
    weight = int8_weight()
    zeros = torch.zeros_like(weight)
    assert type(zeros) is Tensor
    assert torch.equal(zeros, torch.zeros(6, 300))
    assert torch.empty_like(weight, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("move", [nn.Module.cpu, nn.Module.float])
def test_where_it_is_already_nothing_is_touched(move: Callable[[nn.Module], nn.Module]) -> None:
    layer = _trained()
    before = [layer.weight, layer.weight.grad, *parts_of(layer.weight)]
    move(layer)
    after = [layer.weight, layer.weight.grad, *parts_of(layer.weight)]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_weight_and_gradient_stay_the_same_objects_in_another_dtype() -> None:
    layer = _trained()
    weight, grad, codes = layer.weight, layer.weight.grad, layer.weight.codes.clone()
    layer.to(torch.bfloat16)
    assert layer.weight is weight
    assert layer.weight.grad is grad
    assert weight.dtype == grad.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(weight.codes, codes)
    layer(torch.ones(1, 300, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_at_meta_there_is_a_new_parameter_as_of_a_linear_layer() -> None:
    layer = _trained()
    weight = layer.weight
    layer.to("meta")
    assert weight.codes.device.type == "cpu"
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.grad.is_meta
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]


def test_from_meta_it_is_made_empty_and_loads() -> None:
    layer = int8_layer()
    with torch.device("meta"):
        other = int8_layer()
    other.to_empty(device="cpu")
    assert isinstance(other.weight, Int8Weight)
    other.load_state_dict(layer.state_dict())
    assert same_codes(other.weight, layer.weight)


def test_a_move_that_fails_changes_nothing() -> None:
    layer = _trained()
    before = copy.deepcopy(layer.weight)

    def fail(tensor: Tensor) -> Tensor:
        if tensor is layer.weight.grad:
            raise torch.OutOfMemoryError("no room")
        return tensor.to(torch.bfloat16)

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        layer._apply(fail)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert same_codes(layer.weight, before)


def test_moved_it_is_copied_with_codes_and_dtype() -> None:
    layer = _trained().to(torch.bfloat16)
    del layer.held
    other = copy.deepcopy(layer)
    assert isinstance(other.weight, nn.Parameter)
    assert other.weight.dtype == torch.bfloat16
    assert same_codes(other.weight, layer.weight)
    other.weight.requantize_(torch.zeros(6, 300), seed=0, step=0)
    assert not same_codes(other.weight, layer.weight)


def test_shared_weights_move_once_and_stay_shared() -> None:
    net = nn.Sequential(Int8Linear(4, 4), Int8Linear(4, 4))
    net[1].weight = net[0].weight
    net(torch.ones(4)).sum().backward()
    net.to(torch.bfloat16)
    assert net[1].weight is net[0].weight
    assert net[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_new_parameter_is_made_where_torch_is_told_so(monkeypatch: Any, overwrite: bool) -> None:
    monkeypatch.setattr(
        torch.__future__, "get_overwrite_module_params_on_conversion", lambda: overwrite
    )
    layer = int8_layer()
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert (layer.weight is weight) != overwrite
    assert layer.weight.dtype == torch.bfloat16


def test_codes_in_shared_memory() -> None:
    layer = int8_layer().share_memory()
    assert all(x.is_shared() for x in parts_of(layer.weight))


def test_a_module_that_ddp_holds_moves() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    layer = int8_layer()
    model = DistributedDataParallel(layer, gradient_as_bucket_view=True)
    model(torch.ones(2, 300)).sum().backward()
    grad = layer.weight.grad.clone()
    model.cpu()
    model(torch.ones(2, 300)).sum().backward()  # its hooks are there still
    assert torch.equal(layer.weight.grad, 2 * grad)
    model.to(torch.bfloat16)
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.bfloat16
