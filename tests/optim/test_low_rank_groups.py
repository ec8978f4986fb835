"""Groups of the low-rank family: what may not be meant is warned of, or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from harness.low_rank_steps import EVERY, gradients, parameters, run
from torch import nn

from lightning_ext import optim
from lightning_ext.optim import GaLore, param_groups_for

every = pytest.mark.parametrize("name", EVERY)
PLAIN = r"got vectors and matrices in one group.*{0}\(optim\.param_groups_for\(module, {0}\)\)"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.norm1 = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.lm_head = nn.Linear(4, 9)


def unnamed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3))


def silent(groups: Any, **how: Any) -> GaLore:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return GaLore(groups, rank=2, **how)


@every
def test_plain_parameters_of_a_module_are_warned_of_once(name: str) -> None:
    with pytest.warns(UserWarning, match=PLAIN.format(name)) as seen:
        getattr(optim, name)(Model().parameters(), rank=2)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=PLAIN.format(name)) as seen:
        getattr(optim, name)(Model().named_parameters(), rank=2)
    assert len(seen) == 1


def test_matrices_alone_are_not_warned_of() -> None:
    silent(parameters([(4, 3), (5, 6)]))
    silent([{"params": parameters([(4, 3)])}, {"params": parameters([(3,)])}])


def test_groups_that_say_their_algorithm_are_not_warned_of() -> None:
    silent([{"params": Model().parameters(), "algorithm": "low_rank"}])
    silent([{"params": parameters([(4, 3), (3,)])}, {"params": [], "algorithm": "adamw"}])


@every
def test_groups_of_a_module_are_not_warned_of(name: str) -> None:
    kind = getattr(optim, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(param_groups_for(Model(), kind), rank=2)


def test_embeddings_and_outputs_by_name_are_warned_of() -> None:
    found = {"embed.weight": (9, 4), "up.weight": (8, 4), "lm_head.weight": (9, 4)}
    named = list(zip(found, parameters(found.values()), strict=True))
    with pytest.warns(
        UserWarning, match="subspace to 'embed.weight', 'lm_head.weight', by the"
    ) as x:
        GaLore(named, rank=2)
    assert len(x) == 1
    silent([{"params": named, "algorithm": "adamw"}])


def test_a_group_that_comes_later_is_warned_of_by_its_names() -> None:
    first, second = parameters([(4, 3)] * 2)
    optimizer = silent([("up.weight", first)])
    with pytest.warns(UserWarning, match="GaLore gives a subspace to 'head.weight'"):
        optimizer.add_param_group({"params": [("head.weight", second)]})


@every
def test_a_rank_above_all_sides_is_warned_of_at_the_first_step(name: str) -> None:
    shapes = [(9, 6), (6, 4)]
    params = parameters(shapes)
    optimizer = getattr(optim, name)(params, 0.02, rank=6)
    with pytest.warns(
        UserWarning, match=rf"{name} has no.*lr=0\.02: rank=6.*has 6.*rank=0\.25"
    ) as x:
        run(optimizer, params, gradients(2, shapes))
    assert len(x) == 1


def test_a_rank_below_one_side_is_not_warned_of() -> None:
    shapes = [(9, 6), (6, 4)]
    params = parameters(shapes)
    run(GaLore(params, rank=5), params, gradients(1, shapes))


def test_what_goes_to_adamw_by_its_group_has_no_rank_to_warn_of() -> None:
    params = parameters([(9, 6)])
    optimizer = GaLore([{"params": params, "algorithm": "adamw"}])
    run(optimizer, params, gradients(1, [(9, 6)]))


@every
def test_a_guessed_output_is_warned_of_by_the_name_of_the_class(name: str) -> None:
    kind = getattr(optim, name)
    with pytest.warns(UserWarning, match=f"In {name} AdamW gets '2' for the output, as the last"):
        param_groups_for(unnamed(), kind)


def test_unknown_matrices_are_named_with_the_hint_that_fits() -> None:
    model = Model()
    model.table = nn.Parameter(torch.zeros(7, 4))
    hint = r"In GaLore AdamW gets 'table': of two.*overrides=.*\"algorithm\": \"low_rank\""
    with pytest.warns(UserWarning, match=hint):
        param_groups_for(model, GaLore)
    param_groups_for(model, GaLore, adamw=["table"])


def test_a_module_without_a_matrix_for_a_subspace_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="GaLore gets no matrix for a subspace, and is AdamW"):
        param_groups_for(nn.Linear(4, 3), GaLore)


def test_vectors_are_not_sent_to_a_subspace() -> None:
    overrides = {"norm1.weight": {"algorithm": "low_rank"}}
    with pytest.raises(ValueError, match=r"'norm1.weight' has shape \(4,\) .* to a subspace"):
        param_groups_for(Model(), GaLore, overrides=overrides)


def test_muon_is_refused_with_what_the_family_takes() -> None:
    with pytest.raises(ValueError, match="muon= is for NorMuon; GaLore takes overrides="):
        param_groups_for(Model(), GaLore, muon=["up"])
