"""Weights of 8 bits in checkpoints, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from harness.int8_parts import int8_layer, same_codes
from torch import Tensor, nn

from lightning_ext.nn import Int8Linear, Int8Weight, convert_int8_linear


def _saved(module: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_its_state_dict_is_plain_and_comes_back_bit_for_bit() -> None:
    layer, other = int8_layer(), int8_layer()
    state = _saved(layer)
    assert {k: type(v) for k, v in state.items()} == dict.fromkeys(
        ["weight", "bias", "weight_scales", "weight_shifts"], Tensor
    )
    assert state["weight"].dtype == torch.uint8
    other.load_state_dict(state)
    assert same_codes(other.weight, layer.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_floats_loads_to_the_nearest_codes(assign: bool) -> None:
    plain, layer = nn.Linear(300, 6), int8_layer()
    layer.load_state_dict(_saved(plain), assign=assign)
    assert isinstance(layer.weight, nn.Parameter)
    assert same_codes(layer.weight, Int8Weight.of(plain.weight.detach()))
    assert torch.equal(layer.bias, plain.bias)


def test_assigned_codes_are_those_that_were_saved() -> None:
    layer, other = int8_layer(), int8_layer()
    other.load_state_dict(_saved(layer), assign=True)
    assert isinstance(other.weight, Int8Weight)
    assert same_codes(other.weight, layer.weight)
    assert other.weight.requires_grad


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    state = _saved(int8_layer())
    with pytest.raises(RuntimeError, match="block_size that was saved"):
        int8_layer(block_size=128).load_state_dict(state)
    with pytest.raises(RuntimeError, match="without weight_scales"):
        int8_layer().load_state_dict({"weight": state["weight"], "bias": state["bias"]})
    with pytest.raises(RuntimeError, match="it has shape"):
        Int8Linear(299, 6).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        int8_layer().load_state_dict({"bias": state["bias"]})


def test_copies_and_pickles_are_parameters_with_the_same_codes() -> None:
    net = convert_int8_linear(nn.Sequential(nn.Linear(300, 6), nn.Linear(6, 6)))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other[0].weight, nn.Parameter)
        assert other[0].weight.requires_grad
        assert same_codes(other[0].weight, net[0].weight)
        other[0].weight.requantize_(torch.zeros(6, 300), seed=0, step=0)
        assert not same_codes(other[0].weight, net[0].weight)


def test_a_tensor_of_codes_is_copied_as_it_is() -> None:
    value = torch.randn(6, 300)
    weight = Int8Weight.of(value)
    assert not isinstance(copy.deepcopy(weight), nn.Parameter)
    assert torch.equal(torch.zeros(6, 300).copy_(weight), weight.dequantize())
    other = Int8Weight.of(torch.randn(6, 300), block_size=128)
    other.copy_(weight)  # read and rounded to nearest
    assert same_codes(other, Int8Weight.of(weight.dequantize(), block_size=128))
