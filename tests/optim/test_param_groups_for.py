"""Groups by what parameters are for, and what is refused or warned of."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness.optimizer_cases import CASES
from harness.optimizer_parts import Wrapper
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_ext import optim
from lightning_ext.optim import LAMB, LARS, NorMuon, param_groups_for


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(4, 9, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight


class Wrapped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()


def names(groups: list[dict[str, Any]], **settings: Any) -> list[str]:
    """Names in the groups that have these settings."""
    chosen = [x for x in groups if all(x.get(k) == v for k, v in settings.items())]
    return [name for group in chosen for name, _ in group["params"]]


def for_muon(module: nn.Module, **how: Any) -> list[str]:
    return names(param_groups_for(module, NorMuon, **how), algorithm="muon")


def everything(groups: list[dict[str, Any]]) -> list[str]:
    return sorted(names(groups))


def test_hidden_matrices_go_to_muon() -> None:
    each = ["attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight"]
    assert for_muon(Model()) == [f"blocks.{i}.{x}" for i in (0, 1) for x in each]


def test_vectors_and_norms_do_not_decay() -> None:
    groups = param_groups_for(Model(), torch.optim.AdamW, weight_decay=0.1)
    free = names(groups, weight_decay=0.0)
    assert [x["weight_decay"] for x in groups] == [0.1, 0.0]
    assert free[:4] == [
        "blocks.0.norm.weight",
        "blocks.0.attention.in_proj_bias",
        "blocks.0.attention.out_proj.bias",
        "blocks.0.up.bias",
    ]


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_vectors_and_norms_have_no_trust_ratio(kind: Any) -> None:
    groups = param_groups_for(Model(), kind, weight_decay=0.1)
    assert names(groups, trust_ratio=False) == names(groups, weight_decay=0.0)
    optimizer = kind(groups, lr=0.1)  # without a warning
    assert [x["trust_ratio"] for x in optimizer.param_groups] == [True, False]


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 2)),
        nn.RMSNorm((3, 2)),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.InstanceNorm1d(4, affine=True),
        type("MyNorm", (nn.Module,), {})(),
    ],
)
def test_norm_layers_are_known_by_their_kind(norm: nn.Module) -> None:
    if not list(norm.parameters()):
        norm.register_parameter("gain", nn.Parameter(torch.ones(2, 2)))
    module = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2))
    groups = param_groups_for(module, NorMuon, weight_decay=0.1, head="2")
    expected = [f"1.{name}" for name, _ in norm.named_parameters()]
    assert set(expected) < set(names(groups, weight_decay=0.0, algorithm="adamw"))


def test_convolutions_go_to_muon_and_transposed_ones_are_named() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.Conv1d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 2)]
    with pytest.warns(UserWarning, match=r"AdamW gets '2\.weight':.*muon="):
        assert for_muon(nn.Sequential(*layers), head="3") == ["0.weight", "1.weight"]


def test_recurrent_matrices_go_to_muon() -> None:
    module = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    assert for_muon(module, head="1") == ["0.weight_ih_l0", "0.weight_hh_l0"]


def test_tied_weights_are_embeddings_and_there_once() -> None:
    groups = param_groups_for(Model(tied=True), NorMuon, weight_decay=0.1)
    assert names(groups, algorithm="adamw", weight_decay=0.1) == ["tokens.weight"]
    assert everything(groups).count("tokens.weight") == 1
    assert "lm_head.weight" not in everything(groups)


def test_frozen_parameters_are_left_out() -> None:
    module = Model()
    module.blocks.requires_grad_(False)
    with pytest.warns(UserWarning, match="no matrix for Muon"):
        groups = param_groups_for(module, NorMuon)
    assert everything(groups) == ["lm_head.weight", "tokens.weight"]
    assert len(groups) == 1


def layers(**called: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, layer in called.items():
        module.add_module(name, layer)
    return module


def linear() -> nn.Linear:
    return nn.Linear(3, 3, bias=False)


@pytest.mark.parametrize(
    ("module", "hidden"),
    [
        (layers(fc=linear(), a=linear()), ["a.weight"]),
        (layers(a_head=linear(), a=linear(), b_head=linear()), ["a.weight"]),
        (layers(classifier=nn.Sequential(linear(), linear()), z=linear()), ["0", "z"]),
        (layers(net=layers(fc=linear()), fc=linear()), ["net.fc.weight"]),
        (layers(multi_head=linear(), out=linear()), ["multi_head.weight"]),
        (layers(a=linear(), head=nn.Conv2d(1, 1, 1)), ["a.weight"]),
        (layers(embed=linear(), a=linear(), out=linear()), ["a.weight"]),
    ],
)
def test_output_layers_are_found_by_name(module: nn.Module, hidden: list[str]) -> None:
    found = for_muon(module)
    assert len(found) == len(hidden)
    assert all(x in name for x, name in zip(hidden, found, strict=True))


def test_the_output_layer_can_be_named() -> None:
    module = nn.Sequential(linear(), linear(), linear())
    assert for_muon(module, head="0") == ["1.weight", "2.weight"]
    assert for_muon(module, head=["0", "2.*"]) == ["1.weight"]
    assert len(for_muon(module, head=())) == 3


def test_other_matrices_go_to_adamw_and_are_named_once() -> None:
    module = Model()
    module.positions = nn.Parameter(torch.zeros(7, 4))
    module.register_parameter("table", nn.Parameter(torch.zeros(7, 4)))
    with pytest.warns(UserWarning, match="AdamW gets 'positions', 'table': of two") as seen:
        groups = param_groups_for(module, NorMuon, weight_decay=0.1)
    assert len(seen) == 1
    assert {"positions", "table"} < set(names(groups, algorithm="adamw", weight_decay=0.1))


def test_patterns_move_parameters() -> None:
    module = Model()
    module.positions = nn.Parameter(torch.zeros(7, 4))
    found = for_muon(module, muon=["positions"], adamw=["blocks.1", "*.up.weight"])
    assert found == [
        "positions",
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "blocks.0.down.weight",
    ]


def test_patterns_take_decay_away() -> None:
    groups = param_groups_for(Model(), LAMB, weight_decay=0.1, no_decay=["tokens"])
    assert names(groups, weight_decay=0.0, trust_ratio=True) == ["tokens.weight"]


def test_settings_are_overridden_by_pattern_and_later_ones_win() -> None:
    overrides = {"blocks.0": {"lr": 0.5, "weight_decay": 0.2}, "*.norm.*": {"lr": 0.25}}
    optimizer = NorMuon(param_groups_for(Model(), NorMuon, overrides=overrides), lr=0.1)
    rates = {x: g["lr"] for g in optimizer.param_groups for x in g["param_names"]}
    assert rates["blocks.0.up.weight"] == rates["blocks.0.up.bias"] == 0.5
    assert rates["blocks.0.norm.weight"] == rates["blocks.1.norm.weight"] == 0.25
    assert (rates["blocks.1.up.weight"], rates["tokens.weight"]) == (0.1, 3e-4)


def test_a_lightning_module_is_a_module() -> None:
    assert for_muon(Wrapped())[0] == "model.blocks.0.attention.in_proj_weight"
    with pytest.warns(UserWarning, match="no matrix for Muon"):
        groups = param_groups_for(BoringModel(), NorMuon)
    assert everything(groups) == ["layer.bias", "layer.weight"]


def test_without_a_decay_the_optimizer_keeps_its_own() -> None:
    optimizer = torch.optim.AdamW(param_groups_for(Model(), torch.optim.AdamW), weight_decay=0.3)
    assert [x["weight_decay"] for x in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("name", [x for x in CASES if not issubclass(getattr(optim, x), Wrapper)])
def test_every_parameter_is_in_one_group(name: str) -> None:
    groups = param_groups_for(Model(), getattr(optim, name))
    assert everything(groups) == sorted(x for x, _ in Model().named_parameters())
    assert all(x["params"] for x in groups)


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ({"muon": ["blocks.0.up.wieght"]}, r"muon='blocks.0.up.wieght' .*blocks\.0\.up\.weight"),
        ({"head": "lm_haed"}, "head='lm_haed' matches no parameter.*lm_head"),
        ({"overrides": {"nothing.*": {"lr": 1.0}}}, "overrides='nothing"),
        ({"muon": ["blocks.0.up.*"]}, r"'blocks.0.up.bias' has shape \(8,\) and was sent to Muon"),
        ({"overrides": {"*.norm.*": {"algorithm": "muon"}}}, r"norm.weight' has shape \(4,\)"),
        ({"overrides": {"tokens": {"weight_dekay": 1.0}}}, "no setting 'weight_dekay'.*decay"),
        ({"muon": ["tokens"], "adamw": ["tokens"]}, "'tokens.weight' is in muon= and in adamw="),
    ],
)
def test_what_does_not_fit_is_refused_with_names(how: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        param_groups_for(Model(), NorMuon, **how)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'1.weight' has no shape yet.*batch"):
        param_groups_for(nn.Sequential(linear(), nn.LazyLinear(3)), torch.optim.SGD)


def test_optimizers_that_these_groups_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices alone.*beta2=None"):
        param_groups_for(Model(), torch.optim.Muon)
    with pytest.raises(
        ValueError, match=r"adamw= for NorMuon, GaLore and its family; SGD has no such"
    ):
        param_groups_for(Model(), torch.optim.SGD, muon=["tokens"])
    with pytest.raises(ValueError, match="Rprop has no setting 'weight_decay'"):
        param_groups_for(Model(), torch.optim.Rprop, weight_decay=0.1)
    with pytest.raises(TypeError, match="give the class"):
        param_groups_for(Model(), torch.optim.SGD(Model().parameters()))
    with pytest.raises(TypeError, match="Wrapper goes around an optimizer"):
        param_groups_for(Model(), Wrapper)
    with pytest.raises(TypeError, match="a list of patterns"):
        param_groups_for(Model(), NorMuon, muon="tokens")
    with pytest.raises(ValueError, match="no parameter that is trained"):
        param_groups_for(nn.ReLU(), NorMuon)


def test_these_groups_train() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    optimizer = NorMuon(param_groups_for(module, NorMuon, head="3"), adamw_lr=0.01)
    x = torch.randn(32, 4)
    losses: list[Tensor] = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(module(x), x[:, :3].argmax(1)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_a_partial_shows_its_class() -> None:
    made = partial(partial(NorMuon), lr=0.1)
    plain, found = param_groups_for(Model(), NorMuon), param_groups_for(Model(), made)
    assert [x | {"params": [n for n, _ in x["params"]]} for x in found] == [
        x | {"params": [n for n, _ in x["params"]]} for x in plain
    ]


def test_a_function_that_shows_no_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer is a function.*or a partial of it"):
        param_groups_for(Model(), lambda params: torch.optim.SGD(params, lr=0.1))
