"""Ranks by one threshold for all spectra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_ext.nn import convert_int8_linear
from lightning_ext.optim import GaLore, welore_ranks

Spectra = dict[str, list[float]]
HAND: Spectra = {
    "flat": [1.0, 0.95, 0.9, 0.85, 0.8, 0.0],  # normalized as they stand
    "steep": [1.0, 0.3, 0.2, 0.1, 0.05, 0.0],
    "middle": [1.0, 0.6, 0.5, 0.4, 0.15, 0.0],
}


def _layer(values: Tensor) -> nn.Linear:
    """A matrix with these singular values, in a random basis."""
    k = len(values)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (k, k + 2))
    layer = nn.Linear(k + 2, k, bias=False, dtype=torch.float64)
    layer.weight.data.copy_((left * values) @ right[:k])
    return layer


def _module(spectra: Spectra, scale: float = 3.0, shift: float = 1.0) -> nn.ModuleDict:
    made = {x: _layer(scale * torch.tensor(y).double() + shift) for x, y in spectra.items()}
    return nn.ModuleDict({**made, "head": nn.Linear(6, 2, dtype=torch.float64)})


def _ranks(module: nn.Module, **kwargs: Any) -> dict[str, int | None]:
    return {x.removesuffix(".weight"): y for x, y in welore_ranks(module, **kwargs).items()}


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, {"flat": None, "steep": None, "middle": None}),
        (0.12, {"flat": None, "steep": None, "middle": None}),  # half of them, and not more
        (0.25, {"flat": None, "steep": 2, "middle": None}),
        (0.55, {"flat": None, "steep": 1, "middle": 2}),
        (1.0, {"flat": 1, "steep": 1, "middle": 1}),
    ],
)
def test_ranks_of_spectra_made_by_hand(threshold: float, expected: dict[str, int | None]) -> None:
    assert _ranks(_module(HAND), threshold=threshold) == expected


def test_one_threshold_is_for_all_matrices_whatever_their_scale() -> None:
    module = _module(HAND)
    module["steep"].weight.data.mul_(1e4)
    assert _ranks(module, threshold=0.55) == {"flat": None, "steep": 1, "middle": 2}


def test_the_share_that_has_to_be_cut_is_min_ratio() -> None:
    module = _module(HAND)
    assert _ranks(module, threshold=0.12, min_ratio=0.4) == {
        "flat": None,
        "steep": 3,
        "middle": None,
    }
    assert _ranks(module, threshold=0.12, min_ratio=0.0) == {"flat": 5, "steep": 3, "middle": 5}
    assert _ranks(module, threshold=1.0, min_ratio=0.9) == dict.fromkeys(HAND)


def _random_module() -> nn.ModuleDict:
    spectra = {f"layer{i}": torch.rand(4 + 3 * i).pow(1 + i).tolist() for i in range(5)}
    return _module(spectra)


def test_a_higher_threshold_never_gives_a_higher_rank() -> None:
    module = _random_module()
    sizes = {x: len(layer.weight) for x, layer in module.items()}
    last = sizes
    for threshold in torch.linspace(0, 1, 21).tolist():
        found = _ranks(module, threshold=threshold)
        ranks = {x: sizes[x] if y is None else y for x, y in found.items()}
        assert all(1 <= y <= last[x] for x, y in ranks.items())
        last = ranks
    assert set(last.values()) == {1}


@pytest.mark.parametrize("wanted", [0.2, 0.35, 0.5, 0.8])
def test_the_mean_reduction_is_met_within_one_rank(wanted: float) -> None:
    module = _random_module()
    sizes = {x: len(layer.weight) for x, layer in module.items()}
    found = _ranks(module, mean_reduction=wanted, min_ratio=0.0)
    shares = [1 - (sizes[x] if y is None else y) / sizes[x] for x, y in found.items()]
    one_rank = 1 / min(sizes[x] for x in found) / len(found)
    assert abs(sum(shares) / len(shares) - wanted) <= one_rank
    assert len(set(shares)) > 1


def test_the_mean_reduction_finds_the_threshold_of_these_ranks() -> None:
    module = _module(HAND)
    # 1 of 6, 5 of 6 and 4 of 6 are below the one threshold between 0.5 and 0.6.
    found = _ranks(module, mean_reduction=10 / 18, min_ratio=0.0)
    assert found == {"flat": 5, "steep": 1, "middle": 2}
    assert found == _ranks(module, threshold=0.55, min_ratio=0.0)


def _lost(module: nn.ModuleDict, ranks: dict[str, int]) -> float:
    """Mean over matrices of the share of ‖W‖² that is not in the first singular values."""
    lost = []
    for name, rank in ranks.items():
        energy = torch.linalg.svdvals(module[name].weight.detach()).square()
        lost.append((energy[rank:].sum() / energy.sum()).item())
    return sum(lost) / len(lost)


def test_it_loses_less_than_the_same_reduction_everywhere() -> None:
    module = _module(HAND, shift=0.0)
    chosen = _ranks(module, mean_reduction=0.5, min_ratio=0.0)
    ranks = {x: 6 if y is None else y for x, y in chosen.items()}
    assert sum(ranks.values()) == 3 * 3
    assert _lost(module, ranks) < 0.6 * _lost(module, dict.fromkeys(HAND, 3))


def test_it_asks_hidden_matrices_alone() -> None:
    net = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 9)
    )
    assert list(welore_ranks(net, threshold=0.5)) == ["1.weight", "3.weight"]
    assert list(welore_ranks(net, threshold=0.5, exclude=["1"])) == ["3.weight"]
    assert list(welore_ranks(net, threshold=0.5, include=["4"], exclude=["1"])) == [
        "3.weight",
        "4.weight",
    ]
    net[1].requires_grad_(False)
    assert list(welore_ranks(net, threshold=0.5)) == ["3.weight"]


def test_equal_singular_values_are_all_kept() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    nn.init.orthogonal_(net[0].weight)
    assert welore_ranks(net, threshold=1.0) == {"0.weight": None}


def test_weights_in_codes_and_in_half_precision_are_read() -> None:
    module = _module(HAND)
    expected = _ranks(module, threshold=0.55)
    assert _ranks(convert_int8_linear(module), threshold=0.55) == expected
    assert _ranks(_module(HAND).to(torch.bfloat16), threshold=0.55) == expected


def test_sharded_weights_are_gathered() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    module = _module(HAND)
    expected = _ranks(module, threshold=0.55)
    for layer in module.values():
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    assert _ranks(module, threshold=0.55) == expected


def test_ranks_go_into_groups() -> None:
    module = _module(HAND)
    ranks = welore_ranks(module, threshold=0.55)
    groups: list[dict[str, Any]] = []
    for name, param in module.named_parameters():
        rank = ranks.get(name)
        groups.append({"params": [param], **({"rank": rank} if rank else {"algorithm": "adamw"})})
    optimizer = GaLore(groups, lr=0.01)
    for param in module.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    sizes = {
        name: optimizer.state[param]["exp_avg"].numel()
        for name, param in module.named_parameters()
        if param.dim() == 2 and name != "head.weight"
    }
    assert sizes == {"flat.weight": 6 * 8, "steep.weight": 8, "middle.weight": 2 * 8}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give one of them"),
        ({"threshold": 0.1, "mean_reduction": 0.5}, "give one of them"),
        ({"threshold": 1.5}, r"threshold=1.5 is not allowed; it must be in \[0, 1\]"),
        ({"mean_reduction": 1.0}, r"mean_reduction=1.0 is not allowed"),
        ({"threshold": 0.1, "min_ratio": -0.1}, r"min_ratio=-0.1 is not allowed"),
        ({"threshold": 0.1, "exclude": ["nothing"]}, "matches no parameter"),
        ({"threshold": 0.1, "exclude": ["*"]}, "no hidden matrix that is trained"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        welore_ranks(_module(HAND), **settings)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="give the module itself"):
        welore_ranks([torch.ones(2, 2)], threshold=0.1)
