"""Strategies on the command line of a LightningCLI, with the arguments of a class."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from harness import Classifier
from lightning.pytorch.cli import LightningCLI

from lightning_ext.strategies import FSDP2Strategy

CARD = Path(__file__).parents[2] / "docs" / "methods" / "fsdp2.md"
FSDP2 = "lightning_ext.strategies.FSDP2Strategy"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["prog"])
    return [
        "--seed_everything=0",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
    ]


def cli(args: list[str]) -> LightningCLI:
    return LightningCLI(Classifier, run=False, save_config_callback=None, args=args)


def test_a_class_takes_its_arguments(options: list[str]) -> None:
    own = [f"--trainer.strategy={FSDP2}", "--trainer.strategy.wrap=Block"]
    own += ["--trainer.strategy.device_mesh=[1,1]", "--trainer.strategy.timeout=0:01:00"]
    made = cli([*options, *own]).trainer.strategy
    assert isinstance(made, FSDP2Strategy)
    assert (made._wrap, made._mesh_shape) == ("Block", (1, 1))
    assert made._timeout == timedelta(minutes=1)


def test_the_config_of_the_card_is_taken_and_printed(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.findall(r"^```yaml\n(.*?)^```$", CARD.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    config = tmp_path / "config.yaml"
    config.write_text(found[0], "utf-8")
    with pytest.raises(SystemExit) as end:
        cli([f"--config={config}", "--print_config"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(told in printed for told in (FSDP2, "wrap: Block", "- 2\n", "0:01:00"))
