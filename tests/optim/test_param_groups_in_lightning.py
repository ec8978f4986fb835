"""Groups of a module's parameters under LightningCLI, and of layers that thaw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ext.optim import LAMB, LAWN, param_groups_for


class Grouped(BoringModel):
    """The class of optimizers comes by the command line, the groups from the module."""

    def __init__(self, optimizer: OptimizerCallable = LAMB, weight_decay: float = 0.0) -> None:
        super().__init__()
        del self.layer
        self.net = nn.Sequential(nn.Linear(32, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        self.optimizer, self.weight_decay = optimizer, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(param_groups_for(self, LAMB, weight_decay=self.weight_decay))


class FromCallable(Grouped):
    """The module does not name the class; the command line alone does."""

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(param_groups_for(self, self.optimizer))


class Wrapped(Grouped):
    """A wrapper goes around what the command line brings."""

    def configure_optimizers(self) -> Optimizer:
        return LAWN(super().configure_optimizers(), free_steps=1)


def run(
    module: type[Grouped], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> Optimizer:
    monkeypatch.setattr(sys, "argv", ["prog"])
    off = ["logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"]
    flags = [*(f"{x}=false" for x in off), "max_steps=2", f"default_root_dir={tmp_path}"]
    flags += ["limit_val_batches=0"]
    chosen = ["--model.optimizer=lightning_ext.optim.LAMB", "--model.optimizer.lr=0.25"]
    chosen += ["--model.weight_decay=0.125"]
    args: Any = ["fit", "--seed_everything=0", *(f"--trainer.{x}" for x in flags), *chosen, *more]
    cli = LightningCLI(module, save_config_callback=None, args=args)
    assert cli.trainer.global_step == 2
    return cli.trainer.optimizers[0]


def test_the_cli_brings_the_optimizer_and_the_module_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = run(Grouped, tmp_path, monkeypatch)
    assert type(optimizer) is LAMB
    matrices, others = optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"], matrices["trust_ratio"]) == (
        0.25,
        0.125,
        True,
    )
    assert (others["lr"], others["weight_decay"], others["trust_ratio"]) == (0.25, 0.0, False)


def test_the_class_is_read_from_what_the_cli_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = run(FromCallable, tmp_path, monkeypatch, "--model.optimizer.weight_decay=0.5")
    matrices, others = optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"]) == (0.25, 0.5)
    assert (others["weight_decay"], others["trust_ratio"]) == (0.0, False)


def test_a_wrapper_goes_around_the_optimizer_of_the_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = run(Wrapped, tmp_path, monkeypatch)
    assert isinstance(optimizer, LAWN)
    assert type(optimizer.base) is LAMB
    assert torch.is_tensor(optimizer.param_groups[0]["params"][0])


class Thawing(Grouped):
    """Its first layers are frozen for an epoch."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.backbone, self.named = nn.Linear(32, 32), named

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.backbone(x))

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(param_groups_for(self, torch.optim.AdamW, named=self.named))


def thaw(named: bool) -> Trainer:
    off: dict[str, Any] = dict.fromkeys(["logger", "enable_checkpointing"], False)
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False)],
        **off,
    )
    trainer.fit(Thawing(named))
    return trainer


def test_a_callback_that_thaws_layers_adds_its_group_to_groups_without_names() -> None:
    assert len(thaw(named=False).optimizers[0].param_groups) == 3


def test_a_callback_that_thaws_layers_cannot_add_its_group_to_groups_with_names() -> None:
    with pytest.raises(ValueError, match="should be with/without names"):
        thaw(named=True)
