"""Which modules are gathered by themselves, for every form of `wrap`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.mixed_module import Layer, Mixed
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

from lightning_ext.strategies._fsdp2._announce import announce
from lightning_ext.strategies._fsdp2._units import find_roots, find_units

LAYERS = ["layers.0", "layers.1"]


def layer() -> Layer:
    return Layer(4, ())


class Of(LightningModule):
    """Has the modules that it is given."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def names(root: nn.Module, wrap: Any = "transformer_layers") -> list[str]:
    known = {id(module): name for name, module in root.named_modules()}
    return sorted(known[id(module)] for module in find_units(root, wrap))


@pytest.mark.parametrize(
    ("root", "found"),
    [
        (Of(layers=nn.ModuleList([layer(), layer()])), LAYERS),
        (Of(layers=nn.Sequential(nn.Linear(4, 4), layer(), layer())), ["layers.1", "layers.2"]),
        (Of(layers=nn.ModuleDict({"a": layer(), "b": layer()})), ["layers.a", "layers.b"]),
        (Of(net=Of(layers=nn.ModuleList([layer(), layer()]))), ["net.layers.0", "net.layers.1"]),
        (
            Of(net=nn.Sequential(nn.ModuleList([layer(), layer()]), nn.Linear(4, 4))),
            ["net.0.0", "net.0.1"],
        ),
        (
            Of(net=nn.ModuleList(nn.ModuleList([layer(), layer()]) for _ in range(2))),
            ["net.0.0", "net.0.1", "net.1.0", "net.1.1"],
        ),
        (
            Of(a=nn.ModuleList([layer(), layer()]), b=nn.ModuleList([layer(), layer(), layer()])),
            ["a.0", "a.1", "b.0", "b.1", "b.2"],
        ),
        (
            Of(net=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)),
            ["net.layers.0", "net.layers.1"],
        ),
        (Of(net=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), []),  # too small by themselves
        (Of(net=layer()), []),  # not repeated
    ],
    ids=[
        "list",
        "sequential",
        "dict",
        "nested",
        "list in sequential",
        "lists",
        "two",
        "encoder",
        "no",
        "1",
    ],
)
def test_repeated_layers_are_found(root: nn.Module, found: list[str]) -> None:
    assert names(root) == found


@pytest.mark.parametrize(
    "wrap",
    [
        "transformer_layers",
        "Layer",
        [Layer],
        {Layer},
        ModuleWrapPolicy({Layer}),
        CustomPolicy(lambda module: isinstance(module, Layer)),
        lambda module: isinstance(module, Layer),
    ],
    ids=["layers", "name", "list", "set", "policy", "custom", "function"],
)
def test_each_form_says_the_same(wrap: Any) -> None:
    assert names(Mixed(), wrap) == LAYERS


def test_none_makes_one_unit_of_all() -> None:
    assert names(Mixed(), None) == []


def test_classes_may_be_several() -> None:
    found = names(Mixed(), [Layer, nn.Linear])
    inner = [f"{one}.{part}" for one in LAYERS for part in ("down", "up")]
    assert found == sorted([*LAYERS, *inner, "unused"])  # not the head, which is tied


@pytest.mark.parametrize("wrap", ["Lair", [nn.Conv2d], nn.Conv2d], ids=["name", "list", "class"])
def test_a_class_without_modules_is_refused_with_those_there_are(wrap: Any) -> None:
    told = r"Layer \(2\).*Linear \(6\).*Hint"
    with pytest.raises(MisconfigurationException, match=told) as refusal:
        names(Mixed(), wrap)
    assert "Mixed (" not in str(refusal.value)  # the root is no unit
    assert "ModuleDict" not in str(refusal.value)


def test_a_bare_class_is_one_of_several() -> None:
    assert names(Mixed(), Layer) == names(Mixed(), [Layer]) == LAYERS


def large(*layers: nn.Module) -> Of:
    with torch.device("meta"):
        return Of(net=nn.Linear(4000, 4000), layers=nn.ModuleList(layers))


@pytest.mark.parametrize("wrap", ["transformer_layers", lambda _: False])
def test_a_large_module_that_is_gathered_at_once_is_warned_of(wrap: Any) -> None:
    told = r"16,004,000 parameters are gathered at once, by each of 2 ranks.*of Linear \(1\)"
    with pytest.warns(UserWarning, match=told):
        announce(large(), [], wrap, 2)


@pytest.mark.parametrize(
    ("root", "wrap", "ranks", "told"),
    [
        (Mixed(), "transformer_layers", 2, r"Mixed: no repeated layers found, \d+ parameters"),
        (large(), None, 2, "16,004,000 parameters are gathered at once."),
        (large(), "transformer_layers", 1, "16,004,000 parameters are gathered at once."),
    ],
    ids=["small", "on purpose", "one rank"],
)
def test_else_it_is_only_said(
    root: Of, wrap: Any, ranks: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        announce(root, [], wrap, ranks)
    assert re.search(told, caplog.text)


def test_layers_that_are_found_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    root = large(layer(), layer())
    with caplog.at_level("INFO"):
        announce(root, find_units(root, "transformer_layers"), "transformer_layers", 2)
    assert "Of: 2 layers are gathered one by one." in caplog.text


def test_manual_optimization_gathers_its_children_one_by_one() -> None:
    with torch.device("meta"):
        gan = Of(generator=nn.Linear(2600, 2600), critic=nn.Linear(2600, 2600))
    gan.automatic_optimization = False
    announce(gan, [], "transformer_layers", 2)  # 6.8 million at once


def test_inner_units_come_first() -> None:
    root = Mixed()
    found = find_units(root, [Layer, nn.LayerNorm])
    assert found.index(root.layers[0].norm) < found.index(root.layers[0])


def tied(inside: bool) -> Of:
    root = Of(layers=nn.ModuleList([layer(), layer()]), head=nn.Linear(8, 4))
    if inside:
        root.layers[0].down.weight = nn.Parameter(torch.zeros(4, 8))
        root.layers[0].other = nn.Linear(8, 4)
        root.layers[0].other.weight = root.layers[0].down.weight
    else:
        root.head.weight = root.layers[0].down.weight
    return root


def test_a_parameter_tied_inside_of_a_unit_stays_with_it() -> None:
    assert names(tied(inside=True)) == LAYERS


def test_a_unit_that_is_tied_to_the_outside_is_none() -> None:
    assert names(tied(inside=False)) == ["layers.1"]


def test_a_module_in_two_layers_belongs_to_neither() -> None:
    root = Of(layers=nn.ModuleList([layer(), layer(), layer()]))
    root.layers[1].norm = root.layers[0].norm
    assert names(root) == ["layers.2"]


def test_a_layer_that_is_run_several_times_is_one_unit() -> None:
    one = layer()
    assert names(Of(layers=nn.ModuleList([one, one])), [Layer]) == ["layers.0"]


def test_what_has_no_parameters_or_no_forward_is_no_unit() -> None:
    root = Of(layers=nn.ModuleList([nn.Dropout(), layer()]))
    assert names(root, lambda module: True) == sorted(
        f"layers.1{part}" for part in ("", ".norm", ".up", ".down")
    )


def test_what_the_user_sharded_is_left_alone() -> None:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    root = Mixed()
    fully_shard(root.layers[0], ignored_params={root.layers[0].gain})
    assert names(root) == ["layers.1"]


def test_what_the_user_sharded_is_not_warned_of() -> None:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    root = large(layer())
    fully_shard(root.layers[0], ignored_params={root.layers[0].gain})
    announce(root, [], "transformer_layers", 2)


def test_under_manual_optimization_children_are_the_roots() -> None:
    root = Of(a=layer(), b=nn.Linear(4, 4), c=nn.Dropout(), d=nn.ModuleDict({"e": layer()}))
    assert find_roots(root) == [root]
    root.automatic_optimization = False
    assert find_roots(root) == [root.a, root.b, root.d["e"]]
