"""Which layers of a model are converted to weights of 8 bits, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_ext.nn import Int8Linear, convert_int8_linear, undo_int8_linear


def test_only_linear_layers_are_converted_and_hooks_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.MultiheadAttention(4, 2))
    called: list[int] = []
    net[0].register_forward_hook(lambda *_: called.append(1))
    assert convert_int8_linear(net.eval()) is net
    kinds = [type(x).__name__ for x in net.modules()]
    assert kinds[1:] == [
        "Int8Linear",
        "Bilinear",
        "MultiheadAttention",
        "NonDynamicallyQuantizableLinear",
    ]
    net[0](torch.ones(4))
    assert called == [1]
    assert not net[0].training


def test_patterns_choose_layers() -> None:
    def converted(**kwargs: Any) -> list[str]:
        net = nn.ModuleDict({x: nn.Linear(4, 4) for x in ("q", "k", "head")})
        convert_int8_linear(net, **kwargs)
        return [name for name, x in net.items() if isinstance(x, Int8Linear)]

    assert converted(exclude=["head"]) == ["q", "k"]
    assert converted(include=["[qk]"], exclude=["k"]) == ["q"]
    with pytest.raises(ValueError, match="'tail' matches no linear layer; there are q, k, head"):
        converted(exclude=["tail"])
    with pytest.raises(TypeError, match="give a list of patterns"):
        converted(exclude="head")


def test_weights_shared_by_linear_layers_stay_shared() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    convert_int8_linear(net)
    assert net[1].weight is net[0].weight
    assert len(list(net.parameters())) == 3
    undo_int8_linear(net)
    assert net[1].weight is net[0].weight


def test_a_weight_shared_with_an_embedding_is_refused_and_nothing_has_changed() -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    net["embed"] = nn.Embedding(9, 4)
    net["embed"].weight = net["head"].weight
    with pytest.raises(ValueError, match=r"'head' shares its weight with 'embed' \(Embedding\)"):
        convert_int8_linear(net)
    assert type(net["body"]) is nn.Linear
    convert_int8_linear(net, exclude=["head"])
    assert type(net["body"]) is Int8Linear


def test_a_sharded_weight_is_refused() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    layer = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="DTensor"):
        convert_int8_linear(layer)


def test_a_layer_whose_weight_is_floats_by_now_is_not_undone() -> None:
    net = convert_int8_linear(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    net[1].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(TypeError, match="'1' is an Int8Linear with a weight of floats"):
        undo_int8_linear(net)
    assert type(net[0]) is Int8Linear
