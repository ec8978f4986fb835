"""Every member of the rooms in a LightningCLI: made from a file, printed, and made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.cli_parts import (
    CALLBACKS,
    CONFIGS,
    LEAST,
    LOSSES,
    NAMES,
    OPTIMIZERS,
    PRECONDITIONERS,
    SCHEDULES,
    STRATEGIES,
    WRAPPERS,
    Configured,
    Matrix,
    classes,
    cli,
    facts,
    made,
    parsed,
    parser,
    subject,
    told,
    write,
)
from harness.deepspeed_parts import KNOWN_WARNINGS, warm_up

from lightning_ext import callbacks, losses, nn, optim, strategies

pytestmark = [*KNOWN_WARNINGS, pytest.mark.usefixtures("_warm")]
# What code makes, not a config: parts of others, and what is handed tensors.
NOT_CONFIGURED = {
    "BatchScaling",
    "Int8Weight",
    "NodeGroups",
    "QuantizedAllGather",
    "QuantizedReduceScatter",
    "WireCount",
    "WireMeter",
}


@pytest.fixture(scope="module")
def _warm() -> None:
    warm_up()


def test_every_class_is_made_by_one_of_the_configs() -> None:
    reached = {*CALLBACKS, *OPTIMIZERS, *WRAPPERS, *PRECONDITIONERS, *SCHEDULES, *STRATEGIES}
    reached |= {*LOSSES, "Int8Linear"}
    for room in (callbacks, losses, nn, optim, strategies):
        assert set(classes(room)) - reached <= NOT_CONFIGURED, room.__name__


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_printed_makes_the_same_again(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    first = parsed(write(config, tmp_path))
    printed = tmp_path / "printed.yaml"
    printed.write_text(parser().dump(first), "utf-8")
    second = parsed(f"--config={printed}")
    assert parser().dump(second) == printed.read_text("utf-8")
    found = subject(config, made(first))
    assert facts(subject(config, made(second))) == facts(found)
    member = name.partition(".")[2]
    if not name.startswith("strategy."):  # a name is still a name, which the Trainer looks up
        assert member in str(facts(found))


def test_one_file_lists_all_callbacks(tmp_path: Path) -> None:
    listed = [CONFIGS[f"callbacks.{name}"]["trainer"]["callbacks"][0] for name in CALLBACKS]
    config = write({"trainer": {"callbacks": listed}}, tmp_path)
    trainer = cli(config).trainer
    found = [type(callback).__name__ for callback in trainer.callbacks]
    assert [name for name in found if name in CALLBACKS] == CALLBACKS
    printed = tmp_path / "printed.yaml"
    printed.write_text(told(config, "--print_config"), "utf-8")
    assert told(f"--config={printed}", "--print_config") == printed.read_text("utf-8")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_option_optimizer_takes_it(name: str) -> None:
    own = [f"--optimizer.{key}={value}" for key, value in LEAST.get(name, {}).items()]
    option = f"--optimizer=lightning_ext.optim.{name}"
    chosen = cli(option, "--optimizer.lr=0.25", *own, module=Matrix)
    optimizer: Any = chosen.model.configure_optimizers()
    assert type(optimizer) is getattr(optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_wrappers_go_around_each_other(tmp_path: Path) -> None:
    config = CONFIGS["optim.VRGD"]["model"] | CONFIGS["optim.MKOR"]["model"]
    config["optimizer"] = {"class_path": "lightning_ext.optim.LAMB", "init_args": {"lr": 0.5}}
    model = cli(write({"model": config}, tmp_path), auto_configure_optimizers=False).model
    assert isinstance(model, Configured)
    outer = model.configure_optimizers()[0][0]
    assert [type(x) for x in (outer, outer.base, outer.base.base)] == [
        optim.MKOR,
        optim.VRGD,
        optim.LAMB,
    ]
    assert outer.base.base.defaults["lr"] == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_enough_for_a_strategy(name: str) -> None:
    made_of = type(cli(f"--trainer.strategy={name}").trainer.strategy)
    assert made_of is getattr(strategies, NAMES[name])


def test_policies_of_torch_are_chosen_by_class(tmp_path: Path) -> None:
    for room, policy in {"OffloadPolicy": {}, "CPUOffloadPolicy": {"pin_memory": False}}.items():
        torchs = {"class_path": f"torch.distributed.fsdp.{room}", "init_args": policy}
        options = {"offload_policy": torchs, "mp_policy": {"param_dtype": "torch.bfloat16"}}
        chosen = {"class_path": "lightning_ext.strategies.FSDP2Strategy", "init_args": options}
        config = {"trainer": {"strategy": chosen}}
        (found,) = subject(config, made(parsed(write(config, tmp_path))))
        assert type(found._offload_policy).__name__ == room
        assert str(found._mp_policy.param_dtype) == "torch.bfloat16"


def test_deepspeeds_config_counts_where_no_argument_does(tmp_path: Path) -> None:
    options = {"config": {"zero_optimization": {"overlap_comm": False}}}
    kind = "lightning_ext.strategies.DeepSpeedZeroPPStrategy"
    config = {"trainer": {"strategy": {"class_path": kind, "init_args": options}}}
    (chosen,) = subject(config, made(parsed(write(config, tmp_path))))
    found = chosen.config["zero_optimization"]
    assert (found["overlap_comm"], found["reduce_scatter"]) == (False, True)
