"""The contract of the room: undone = original outputs; state-dict names kept; idempotent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_ext import nn
from lightning_ext.nn import Int8Linear, Int8Weight, convert_int8_linear, undo_int8_linear


@dataclass(frozen=True)
class Contract:
    """How a module is converted, in place, and converted back."""

    convert: Callable[[torch.nn.Module], object]
    undo: Callable[[torch.nn.Module], object]


def _layers(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    return ((n, x) for n, x in list(module.named_children()) if isinstance(x, torch.nn.Linear))


def _replace_layers(module: torch.nn.Module) -> None:
    """By layers that load what the old ones had."""
    for name, layer in _layers(module):
        new = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None)
        new.load_state_dict(layer.state_dict())
        setattr(module, name, new)


def _replace_weights(module: torch.nn.Module) -> None:
    for _, layer in _layers(module):
        if not isinstance(layer.weight, Int8Weight):
            layer.weight = torch.nn.Parameter(Int8Weight.of(layer.weight.detach()))


def _read_weights(module: torch.nn.Module) -> None:
    for _, layer in _layers(module):
        if isinstance(layer.weight, Int8Weight):
            layer.weight = torch.nn.Parameter(layer.weight.dequantize())


CONTRACTS = {
    "Int8Linear": Contract(_replace_layers, undo_int8_linear),
    "Int8Weight": Contract(_replace_weights, _read_weights),
    "convert_int8_linear": Contract(convert_int8_linear, undo_int8_linear),
    "undo_int8_linear": Contract(convert_int8_linear, undo_int8_linear),
}
every_name = pytest.mark.parametrize("name", nn.__all__)


def _net() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(300, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 5, bias=False)
    )


def _outputs(module: torch.nn.Module) -> Tensor:
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
    return module(x)


def test_every_public_name_has_a_contract() -> None:
    assert sorted(nn.__all__) == sorted(CONTRACTS)


@every_name
def test_undone_has_the_outputs_of_what_was_converted(name: str) -> None:
    net = _net()
    CONTRACTS[name].convert(net)
    converted = _outputs(net)
    CONTRACTS[name].undo(net)
    assert not any(isinstance(x, Int8Weight) for x in net.parameters())
    assert torch.equal(_outputs(net), converted)


@every_name
def test_numbers_that_codes_stand_for_come_through_bit_for_bit(name: str) -> None:
    net = undo_int8_linear(convert_int8_linear(_net()))
    original = _outputs(net)
    CONTRACTS[name].convert(net)
    assert any(isinstance(x, Int8Weight) for x in net.parameters())
    assert torch.equal(_outputs(net), original)
    CONTRACTS[name].undo(net)
    assert torch.equal(_outputs(net), original)


@every_name
def test_converted_is_within_half_a_step_of_the_original(name: str) -> None:
    net = _net()
    before = net[0].weight.detach().clone()
    CONTRACTS[name].convert(net)
    steps = net[0].weight.scales.repeat_interleave(256, dim=1)[:, :300]
    assert ((net[0].weight.dequantize() - before).abs() <= 0.5001 * steps).all()


@every_name
def test_names_of_the_state_dict_are_kept(name: str) -> None:
    net = _net()
    names = list(net.state_dict())
    CONTRACTS[name].convert(net)
    assert set(names) <= set(net.state_dict())
    assert [x for x, _ in net.named_parameters()] == names
    CONTRACTS[name].undo(net)
    assert list(net.state_dict()) == names


@every_name
@pytest.mark.parametrize("which", ["convert", "undo"])
def test_once_more_changes_nothing(name: str, which: str) -> None:
    net = _net()
    CONTRACTS[name].convert(net)
    for _ in range(2):
        getattr(CONTRACTS[name], which)(net)
        kinds, outputs = [type(x) for x in net.modules()], _outputs(net)
        getattr(CONTRACTS[name], which)(net)
        assert [type(x) for x in net.modules()] == kinds
        assert torch.equal(_outputs(net), outputs)
