"""What PipelineStrategy refuses, on all ranks and before anything trains."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import Chain, by_one, by_pipeline, distance, loaders, pipeline_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ext.strategies import PipelineStrategy


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ({"module": nn.Linear(1, 1)}, "the name of a submodule, None. Hint"),
        ({"schedule": 3}, "one of 'breadth_first', 'gpipe', '1f1b', 'interleaved_1f1b'"),
        ({"stages_per_rank": 1.5}, "an integer of at least 1, 'layers', 'auto'"),
        ({"stages_per_rank": "all"}, "an integer of at least 1, 'layers', 'auto'"),
        ({"num_microbatches": True}, "an integer of at least 1, 'auto'"),
        ({"split": 2}, "one of 'uniform', 'params', 'time', or the first layers of all"),
        ({"split": [1, 2.0]}, "one of 'uniform', 'params', 'time', or the first layers of all"),
        ({"data_parallel": None}, "one of 'fsdp2', 'ddp'"),
        ({"data_parallel_size": "auto"}, "an integer of at least 1"),
        ({"activation_checkpointing": "yes"}, "True, False"),
        ({"save_distributed_checkpoint": 1}, "True, False"),
        ({"mp_policy": "bf16"}, "MixedPrecisionPolicy, None. Hint"),
        ({"timeout": 30}, r"timedelta, None. Hint: timedelta\(seconds=30\)"),
    ],
    ids=str,
)
def test_an_argument_of_another_kind_is_refused(option: dict[str, Any], allowed: str) -> None:
    with pytest.raises(TypeError, match=rf"{next(iter(option))} was .*; allowed is .*{allowed}"):
        PipelineStrategy(**option)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"schedule": "zero_bubble"}, "schedule was 'zero_bubble'; allowed is one of 'breadth"),
        ({"split": "loss"}, "split was 'loss'; allowed is one of 'uniform', 'params', 'time'"),
        ({"split": [3, 3]}, r"split was \[3, 3\]; allowed are ascending numbers of at least 1"),
        ({"split": [0, 3]}, r"split was \[0, 3\]; allowed are ascending numbers of at least 1"),
        ({"data_parallel": "fsdp"}, "data_parallel was 'fsdp'; allowed is one of 'fsdp2', 'ddp'"),
        ({"data_parallel_size": 0}, "data_parallel_size was 0; allowed is an integer of at least"),
        ({"num_microbatches": 0}, "num_microbatches was 0; allowed is an integer of at least 1"),
        ({"stages_per_rank": -1}, "stages_per_rank was -1; allowed is an integer of at least 1"),
    ],
    ids=str,
)
def test_a_value_that_there_is_not_is_refused(option: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PipelineStrategy(**option)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_schedules_of_one_stage_have_no_more(schedule: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"stages_per_rank=2 .*allowed is 1. Hint"):
        PipelineStrategy(schedule=schedule, stages_per_rank=2)


@pytest.mark.parametrize("how", [{}, {"data_parallel_size": 2, "data_parallel": "ddp"}], ids=str)
def test_a_policy_that_nothing_follows_is_refused(how: dict[str, Any]) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(MisconfigurationException, match="mp_policy does nothing with"):
        PipelineStrategy(mp_policy=policy, **how)


@pytest.mark.parametrize(
    "how",
    [
        {"module": "net", "split": (1, 2), "num_microbatches": "auto"},
        {"split": "time", "stages_per_rank": "layers", "timeout": timedelta(seconds=3)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16), "data_parallel_size": 2},
    ],
    ids=str,
)
def test_every_form_of_an_argument_is_taken(how: dict[str, Any]) -> None:
    PipelineStrategy(**how)


class Manual(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Helpless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3, device="meta"))


class Empty(Chain):
    """Its last layer is on the meta device and cannot fill itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Helpless()


# What is set, of which module, and what is told.
RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any], str]] = {
    "replicas": (Chain, {"data_parallel_size": 3}, {}, r"3 does not divide 2 ranks.* \[1, 2\]"),
    "a layer a stage": (
        Chain,
        {"stages_per_rank": "layers"},
        {},
        "makes 5 stages of 5 layers on 2 ranks; allowed under 'breadth_first' is a multiple of 2",
    ),
    "a layer a stage of gpipe": (
        Chain,
        {"stages_per_rank": "layers", "schedule": "gpipe"},
        {},
        "makes 5 stages of 5 layers on 2 ranks; allowed under 'gpipe' is 2 layers",
    ),
    "16-mixed": (
        Chain,
        {},
        {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
        "precision='16-mixed' does not go with PipelineStrategy, whose ranks would not agree",
    ),
    "manual optimization": (Manual, {}, {}, "automatic_optimization=False does not go with"),
    "averaged weights": (
        Chain,
        {},
        {"callbacks": [StochasticWeightAveraging(1e-2)]},
        "StochasticWeightAveraging does not go with PipelineStrategy.*EMA",
    ),
    "an empty module": (Empty, {}, {}, "without a `reset_parameters.*Helpless: scale"),
    "a split of other stages": (Chain, {"split": [1]}, {}, "does not make 4 stages of 5 layers"),
    "micro-batches of a schedule": (
        Chain,
        {"schedule": "interleaved_1f1b", "num_microbatches": 3, "data_parallel_size": 1},
        {},
        "does not take 3 micro-batches|cannot be cut into 3 equal",
    ),
}


def refused(name: str) -> str:
    make, options, how, _ = RUNS[name]
    with pytest.raises(MisconfigurationException) as caught:
        by_pipeline(make(), options, **how)
    return str(caught.value)


def all_refused() -> dict[str, str]:
    return {name: refused(name) for name in RUNS}


@pytest.fixture(scope="module")
def told() -> list[dict[str, str]]:
    return run_distributed(all_refused)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_would_train_wrongly_is_refused(name: str, told: list[dict[str, str]]) -> None:
    for one in told:
        assert re.search(RUNS[name][3], one[name]), one[name]


def with_own(what: str) -> str:
    second = os.environ["RANK"] == "1"
    module, options, how, accumulate = Chain(), {}, {}, 1
    if what == "num_microbatches":
        options = {what: 2 if second else 4}
    elif what == "data_parallel_size":
        options = {what: 2 if second else 1}
    elif what == "split":
        options = {what: [1, 2, 3] if second else [1, 2, 4]}
    elif what == "accumulate_grad_batches":
        accumulate = 2 if second else 1
    elif what == "gradient_clip_val":
        how = {what: 0.1 if second else None}
    else:
        module.head.bias.requires_grad_(second)
    with pytest.raises(MisconfigurationException) as caught:
        by_pipeline(module, options, accumulate, **how)
    return str(caught.value)


RUN = ["accumulate_grad_batches", "gradient_clip_val", "the module"]
DIFFERING = ["num_microbatches", "data_parallel_size", "split", *RUN]


def all_differing() -> dict[str, str]:
    return {what: with_own(what) for what in DIFFERING}


@pytest.fixture(scope="module")
def disagreed() -> list[dict[str, str]]:
    return run_distributed(all_differing)


@pytest.mark.parametrize("what", DIFFERING)
def test_ranks_that_differ_are_refused(what: str, disagreed: list[dict[str, str]]) -> None:
    assert all(f"Ranks disagree about {what} (here" in one[what] for one in disagreed)


def twice(same: bool) -> str:
    module = Chain()
    run = pipeline_trainer(max_steps=1, accumulate_grad_batches=1)
    run.fit(module, *loaders())
    again = run if same else pipeline_trainer()
    try:
        again.validate(module, loaders()[1], verbose=False)
    except MisconfigurationException as error:
        return str(error)
    return ""


def test_a_module_that_was_split_stays_with_its_trainer() -> None:
    assert run_distributed(twice, args=(True,)) == ["", ""]
    for told in run_distributed(twice, args=(False,)):
        assert "Chain was split before, and this rank has only its own stages" in told


def another() -> None:
    run = pipeline_trainer(max_steps=1, accumulate_grad_batches=1)
    run.fit(Chain(), *loaders())
    run.fit(Chain(), *loaders())


def test_a_strategy_stays_with_its_module() -> None:
    with pytest.raises(MisconfigurationException, match="Chain is not the Chain that this strat"):
        run_distributed(another)


def corrected() -> None:
    """What was refused before it was split is whole, and can be split otherwise."""
    module = Chain()
    with pytest.raises(MisconfigurationException):
        by_pipeline(module, {"stages_per_rank": 3})
    by_pipeline(module)


def test_after_a_refusal_the_module_is_whole() -> None:
    run_distributed(corrected)


class Meta(Chain):
    """Has no values before the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.to("meta")


class Filled(Callback):
    """Fills a module of one process as the pipeline does."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        module.to_empty(device="cpu")
        for one in module.modules():
            if isinstance(one, nn.Linear):
                one.reset_parameters()


def empty() -> Any:
    torch.manual_seed(5 + int(os.environ["RANK"]))  # the first rank's values are for all
    return by_pipeline(Meta(), max_epochs=1)


def test_parameters_on_the_meta_device_are_filled_alike_on_all_ranks() -> None:
    torch.manual_seed(5)
    one = by_one(Meta(), callbacks=[Filled()], max_epochs=1)
    for found in run_distributed(empty):
        assert distance(found.weights, one.weights) < 1e-12


class Single(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.float()


def in_double() -> Any:
    return by_pipeline(Single(), precision="64-true", strategy="breadth_first_pipeline")


def test_float64_is_taken_by_name() -> None:
    one = by_one(Single(), precision="64-true")
    for found in run_distributed(in_double):
        assert distance(found.weights, one.weights) < 1e-12
