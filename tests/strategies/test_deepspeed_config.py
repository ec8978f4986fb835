"""Arguments of DeepSpeedZeroPPStrategy, the config they make, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader, run_distributed, trainer
from harness.deepspeed_parts import KNOWN_WARNINGS, deepspeed, warm_up
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ext import callbacks, optim
from lightning_ext.strategies import DeepSpeedZeroPPStrategy
from lightning_ext.strategies._deepspeed._checks import (
    TOUCHES_PARAMETERS,
    WHOLE_TENSORS,
    check_callbacks,
    check_optimizer,
)
from lightning_ext.strategies._deepspeed._cpu import prepare_cpu
from lightning_ext.strategies._deepspeed._options import ZeroPPOptions

pytestmark = [*KNOWN_WARNINGS, pytest.mark.usefixtures("_warm")]
SETTINGS = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
)


@pytest.fixture(scope="module")
def _warm() -> None:
    warm_up()


def zero(**options: Any) -> dict[str, Any]:
    config = DeepSpeedZeroPPStrategy(**options).config
    assert config is not None
    return config["zero_optimization"]


def resolved(devices: int = 8, world: int = 16, node: int = 8, **options: Any) -> tuple[Any, ...]:
    found = ZeroPPOptions(**options).resolved({}, world=world, ranks_per_node=node, devices=devices)
    return tuple(found[name] for name in SETTINGS)


def test_lightnings_defaults_stay_beside_what_is_set() -> None:
    plain = DeepSpeedStrategy(stage=3).config
    assert plain is not None
    found = DeepSpeedZeroPPStrategy(
        hpz_partition_size=8, quantize_gradients=True, config={"steps_per_print": 7}
    ).config
    ours = {"zero_hpz_partition_size": 8, "zero_quantized_gradients": True}
    expected = plain["zero_optimization"] | ours
    assert found == plain | {"steps_per_print": 7, "zero_optimization": expected}


def test_a_config_is_merged_and_left_as_it_is(tmp_path: Path) -> None:
    given = {"zero_optimization": {"reduce_bucket_size": 5, "offload_param": {"device": "cpu"}}}
    before = copy.deepcopy(given)
    found = zero(config=given)
    found["offload_param"]["device"] = "nvme"
    assert given == before
    assert (found["reduce_bucket_size"], found["stage"], found["overlap_comm"]) == (5, 3, True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    assert zero(config=path)["reduce_bucket_size"] == 5


def test_the_environment_names_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5}}))
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(path))
    assert zero()["reduce_bucket_size"] == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantize_weights": False, "config": {"zero_quantized_weights": True}}, "in one of"),
        ({"hpz_partition_size": 4, "config": {"zero_hpz_partition_size": 8}}, "is 8 .* and 4"),
        ({"hpz_partition_size": None, "config": {"zero_hpz_partition_size": 8}}, "is 8 .* and 1"),
        ({"overlap_comm": False, "config": {"overlap_comm": True}}, "overlap_comm is True"),
        ({"config": {"stage": 2}}, r"stage is 2 .* refines stage 3"),
        ({"stage": 1}, r"stage=1 .* were set; ZeRO\+\+ refines stage 3"),
        ({"zero_optimization": False}, "zero_optimization=False were set"),
    ],
)
def test_settings_that_disagree_are_refused(options: dict[str, Any], text: str) -> None:
    if "config" in options:
        options = {**options, "config": {"zero_optimization": options["config"]}}
    with pytest.raises(MisconfigurationException, match=text):
        DeepSpeedZeroPPStrategy(**options)


def test_a_switch_in_place_of_a_section_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="allowed is a section"):
        DeepSpeedZeroPPStrategy(config={"zero_optimization": True})


def test_the_same_in_both_places_is_allowed() -> None:
    config = {"zero_optimization": {"zero_quantized_nontrainable_weights": True, "stage": 3}}
    assert zero(config=config)["zero_quantized_nontrainable_weights"]
    again = zero(config={"zero_optimization": {"overlap_comm": False}}, overlap_comm=False)
    assert not again["overlap_comm"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"hpz_partition_size": 1}, ValueError, "of at least 2, 'auto', None"),
        ({"hpz_partition_size": 2.0}, TypeError, r"hpz_partition_size was 2\.0"),
        ({"hpz_partition_size": True}, TypeError, "hpz_partition_size was True"),
        ({"quantize_weights": 1}, TypeError, "True, False, 'auto'"),
        ({"quantize_gradients": "on"}, TypeError, "quantize_gradients was 'on'"),
        ({"quantize_nontrainable_weights": "auto"}, TypeError, "allowed is True or False"),
        ({"ranks_per_node": 0}, ValueError, "of at least 1, 'auto'"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        DeepSpeedZeroPPStrategy(**options)


def test_auto_means_all_of_zeropp_on_several_nodes_of_gpus() -> None:
    assert resolved() == (8, True, True)


def test_auto_means_no_second_partition_where_it_would_be_the_first() -> None:
    assert resolved(world=8) == (1, True, True)
    assert resolved(world=8, node=1, devices=1) == (1, True, True)


def test_auto_means_what_a_cpu_can() -> None:
    assert resolved(devices=0, world=4, node=2) == (2, False, False)


def test_each_part_is_a_switch_of_its_own() -> None:
    assert resolved(hpz_partition_size=None) == (1, True, True)
    assert resolved(quantize_weights=False) == (8, False, True)
    assert resolved(quantize_gradients=False, hpz_partition_size=4) == (4, True, False)


def test_what_the_config_says_of_a_part_counts() -> None:
    given = {"zero_hpz_partition_size": 4, "zero_quantized_weights": False}
    found = ZeroPPOptions().resolved(given, world=16, ranks_per_node=8, devices=8)
    assert tuple(found[name] for name in SETTINGS) == (4, False, True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hpz_partition_size": 3}, "=3 does not divide the 16 ranks"),
        ({"hpz_partition_size": 16}, "=16 does not divide the 8 ranks of a node"),
        ({"node": 5}, "ranks_per_node=5 does not divide 16 ranks into nodes"),
        ({"node": 4, "hpz_partition_size": None}, "DeepSpeed takes the 8 devices that it sees"),
        ({"devices": 0, "quantize_weights": True}, "quantize_weights is on .* on a CPU"),
        ({"devices": 0, "quantize_nontrainable_weights": True}, "nontrainable_weights is on"),
    ],
)
def test_what_does_not_fit_the_ranks_or_the_device_is_refused(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(MisconfigurationException, match=text):
        resolved(**options)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_ext\[deepspeed\]"'):
        DeepSpeedZeroPPStrategy()


def test_a_cpu_is_prepared_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops

    monkeypatch.setenv("LOCAL_SIZE", "7")
    prepare_cpu(2)
    assert os.environ["LOCAL_SIZE"] == "2"
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_a_cpu_is_refused_where_deepspeed_took_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed.accelerator

    taken = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: taken)
    with pytest.raises(
        MisconfigurationException, match=r"for 'cuda' .* Hint: .*DS_ACCELERATOR=cpu"
    ):
        prepare_cpu(1)


def test_it_can_be_configured_from_the_command_line() -> None:
    parser = LightningArgumentParser()
    parser.add_argument("--strategy", type=DeepSpeedZeroPPStrategy)
    given = ["--strategy=DeepSpeedZeroPPStrategy", "--strategy.hpz_partition_size=4"]
    given += ["--strategy.quantize_weights=false", "--strategy.offload_optimizer=true"]
    found = parser.instantiate_classes(parser.parse_args(given)).strategy
    assert found.config["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert found.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_every_callback_of_the_suite_is_refused_or_known_to_work() -> None:
    work = {"AdaptiveBatchSize", "CommunicationVolume"}
    classes = {x for x in callbacks.__all__ if isinstance(getattr(callbacks, x), type)}
    found = {x for x in classes if issubclass(getattr(callbacks, x), Callback)}
    assert found - work <= TOUCHES_PARAMETERS


def test_callbacks_that_need_weights_or_gradients_are_refused() -> None:
    class Mine(callbacks.EMA):
        pass

    run = trainer([Mine(), callbacks.GradientNoiseScale()])
    with pytest.raises(MisconfigurationException, match="Mine, GradientNoiseScale need weights"):
        check_callbacks(run)


@pytest.mark.parametrize("made", WHOLE_TENSORS, ids=lambda made: made.__name__)
def test_optimizers_of_whole_parameters_are_refused(made: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(MisconfigurationException, match=f"{made.__name__} looks at whole"):
        check_optimizer(made.__new__(made))


def test_an_optimizer_that_deepspeed_replaces_is_refused() -> None:
    adagrad = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(MisconfigurationException, match="makes a new Adagrad of its own"):
        check_optimizer(adagrad)


def test_elementwise_optimizers_are_not_refused() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    for made in (torch.optim.AdamW, optim.Lion, optim.DiffGrad):
        check_optimizer(made(weights, lr=0.1))


def test_clipping_by_value_is_refused() -> None:
    options = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    run = trainer(strategy=deepspeed(), devices=1, **options)
    with pytest.raises(MisconfigurationException, match="clipping gradients by value"):
        run.fit(Classifier(), loader())


class Single(Classifier):
    """Has a parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))


def fit_single() -> None:
    fit(module=Single(), strategy=deepspeed(), devices=1)


def test_a_parameter_without_a_dimension_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match=r"dimension: gain\. Hint.*tensor\(\[2"):
        run_distributed(fit_single, 1)


@pytest.mark.parametrize("call", ["view", "export"])
def test_before_a_trainer_has_set_it_up_it_says_so(call: str) -> None:
    args = ("x",) if call == "export" else ()
    with pytest.raises(RuntimeError, match="ZeroPPStrategy has no module yet: a Trainer"):
        getattr(deepspeed(), call)(*args)
