"""What FSDP2Strategy refuses, on all ranks and before anything trains."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from harness import run_distributed
from harness.fsdp2_parts import by_fsdp2
from harness.mixed_module import Mixed
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy
from lightning_ext.strategies._fsdp2._unused import reduce_unused


@pytest.mark.parametrize("mesh", [(2,), (2, 0), (1, 2, 2), (2, 1.0), "22", 3])
def test_a_mesh_is_two_counts(mesh: Any) -> None:
    with pytest.raises(ValueError, match=r"device_mesh=.*\(replicate, shard\)"):
        FSDP2Strategy(device_mesh=mesh)


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ZeroPPStrategy])
@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ({"timeout": 30}, r"timedelta, None. Hint: timedelta\(seconds=30\)"),
        ({"ranks_per_node": "2"}, "an integer of at least 1, 'auto'"),
        ({"mp_policy": "bf16"}, "MixedPrecisionPolicy, None. Hint"),
        ({"offload_policy": True}, r"OffloadPolicy, None. Hint: CPUOffloadPolicy"),
        ({"find_unused_parameters": "no"}, "True, False"),
        ({"wrap": 3}, "'transformer_layers', the name of a class, classes"),
        ({"wrap": ["Block"]}, "'transformer_layers', the name of a class, classes"),
        ({"wrap": int}, "'transformer_layers', the name of a class, classes"),
    ],
    ids=str,
)
def test_an_argument_of_another_kind_is_refused(strategy: Any, option: Any, allowed: str) -> None:
    with pytest.raises(TypeError, match=rf"{next(iter(option))} was .*; allowed is .*{allowed}"):
        strategy(**option)


def test_whether_units_are_kept_is_a_switch_or_ranks() -> None:
    wrong: Any = "no"
    with pytest.raises(TypeError, match="was 'no'; allowed is an integer of at least 2, True"):
        FSDP2Strategy(reshard_after_forward=wrong)
    with pytest.raises(ValueError, match="was 1; allowed is an integer of at least 2, True"):
        FSDP2Strategy(reshard_after_forward=1)


def test_nodes_of_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks_per_node was 0; allowed is an integer of at"):
        FSDP2Strategy(ranks_per_node=0)


@pytest.mark.parametrize("switch", ["quantize_weights", "hpz", "quantize_gradients"])
def test_switches_of_zeropp_are_true_or_false(switch: str) -> None:
    options: dict[str, Any] = {switch: "auto"}
    with pytest.raises(TypeError, match=f"{switch} was 'auto'; allowed is True, False"):
        ZeroPPStrategy(**options)


@pytest.mark.parametrize(
    "wrap",
    [None, "Block", nn.Linear, {nn.Linear}, ModuleWrapPolicy({nn.Linear}), lambda one: True],
)
def test_every_form_of_wrap_is_taken(wrap: Any) -> None:
    FSDP2Strategy(wrap)


def on_one_rank(how: dict[str, Any]) -> None:
    by_fsdp2(steps=1, how=how)


def test_nodes_must_divide_the_ranks() -> None:
    with pytest.raises(MisconfigurationException, match=r"3 does not divide 1 ranks.*\[1\].*Hint"):
        run_distributed(on_one_rank, 1, args=({"ranks_per_node": 3},))


def test_on_one_rank_any_number_of_ranks_keeps_units_as_true_does() -> None:
    run_distributed(on_one_rank, 1, args=({"reshard_after_forward": 3},))


def with_options(how: dict[str, Any]) -> None:
    by_fsdp2(steps=1, how=how)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"device_mesh": (2, 2)}, r"has 4 ranks, and there are 2.*replicate·shard=2"),
        ({"reshard_after_forward": 3}, r"reshard_after_forward=3 does not divide the 2 ranks"),
        ({"reshard_after_forward": 2}, r"allowed are none between 1 and them, True and False"),
        ({"wrap": "Lair"}, r"class Lair, of which Mixed has no module.*Layer \(2\)"),
    ],
    ids=["mesh", "reshard", "all", "class"],
)
def test_what_does_not_fit_the_run_is_refused_on_all_ranks(how: dict[str, Any], told: str) -> None:
    ends = run_distributed(with_options, args=(how,), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    for end in ends:
        assert re.search(told, str(end))


def with_own(what: str) -> None:
    first = os.environ["RANK"] == "0"
    module, how = Mixed(), {}
    if what == "an option":
        how = {"reshard_after_forward": first}
    elif what == "a shape":
        module = Mixed(width=10 if first else 12)
    elif what == "a frozen one":
        module.unused.requires_grad_(first)
    else:
        module.add_module("more", nn.Identity() if first else nn.Linear(1, 1))
    by_fsdp2(module, 1, how=how)


@pytest.mark.parametrize("what", ["an option", "a shape", "a frozen one", "a module"])
def test_ranks_that_differ_are_refused_on_all_of_them(what: str) -> None:
    ends = run_distributed(with_own, args=(what,), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    name = "reshard_after_forward" if what == "an option" else "the module"
    assert all(f"Ranks disagree about {name} (here" in str(end) for end in ends)


def test_a_torch_that_cannot_reduce_unused_parameters_is_named() -> None:
    older: Any = nn.Linear(1, 1)
    with pytest.raises(MisconfigurationException, match=r"needs torch 2\.13, and this is"):
        reduce_unused(older)


# What the second rank has otherwise: of the run, and of the strategy.
OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradient_clip_val": ({"gradient_clip_val": 0.1}, {}),
    "gradient_clip_algorithm": ({"gradient_clip_algorithm": "value"}, {}),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 2}, {}),
    "precision": ({"precision": "bf16-mixed"}, {}),
    "save_distributed_checkpoint": ({}, {"save_distributed_checkpoint": False}),
    "offload_policy": ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
}


def with_another(name: str) -> None:
    run, how = OTHERWISE[name] if os.environ["RANK"] == "1" else ({}, {})
    by_fsdp2(Mixed(), 1, how=how, **run)


@pytest.mark.parametrize("name", OTHERWISE)
def test_ranks_that_would_call_other_collectives_are_refused_on_all_of_them(name: str) -> None:
    ends = run_distributed(with_another, args=(name,), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    assert all(f"Ranks disagree about {name} (here" in str(end) for end in ends)
