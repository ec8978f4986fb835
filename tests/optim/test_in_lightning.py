"""Optimizers in a Trainer: accumulation, clipping, a gradient scaler, checkpoints, the CLI."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness._optimizer_case import Net, groups_of
from harness.optimizer_cases import CASES
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext import optim

AUTOMATIC = [name for name, case in CASES.items() if case.automatic]
every = pytest.mark.parametrize("name", AUTOMATIC)
BY_NAME = [
    name
    for name in AUTOMATIC
    if next(iter(inspect.signature(getattr(optim, name)).parameters)) == "params"
]


class Module(LightningModule):
    """The net of the contract, trained by one of its optimizers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self.name = Net(torch.float32), name
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_callbacks(self) -> list[Any]:
        return CASES[self.name].callbacks()

    def configure_optimizers(self) -> Optimizer:
        case = CASES[self.name]
        return case.make(self.net, groups_of(self.net, case.lr))


class Fitted(LightningModule):
    """For the CLI, which brings the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = Parameter(torch.randn(3, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(batch[0] @ self.weight.T, batch[1])

    def train_dataloader(self) -> Iterable[Any]:
        return data()


def data() -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(5)
    x = torch.randn(32, 5)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)


def fit(module: LightningModule, tmp_path: Path, **how: Any) -> Trainer:
    settings: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "accumulate_grad_batches": 2,
        "max_epochs": 8,
    }
    ckpt_path = how.pop("ckpt_path", None)
    trainer = Trainer(**settings | how)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


@every
def test_it_trains_with_accumulation_and_clipping(name: str, tmp_path: Path) -> None:
    module = Module(name)
    fit(module, tmp_path, gradient_clip_val=1.0)
    assert sum(module.losses[-8:]) < 0.85 * sum(module.losses[:8])


@every
def test_it_trains_under_a_gradient_scaler(name: str, tmp_path: Path) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**40)  # some steps are skipped first
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = Module(name)
    fit(module, tmp_path, plugins=[precision])
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in module.parameters())
    assert sum(module.losses[-8:]) < sum(module.losses[:8])


@every
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    whole, first, second = Module(name), Module(name), Module(name)
    fit(whole, tmp_path, max_epochs=4)
    trainer = fit(first, tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    pairs = zip(whole.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_cli_makes_it_by_its_dotted_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prog"])
    flags = ["logger=false", "enable_checkpointing=false", "enable_model_summary=false"]
    flags += ["enable_progress_bar=false", "max_steps=2", f"default_root_dir={tmp_path}"]
    chosen = [f"--optimizer=lightning_ext.optim.{name}", "--optimizer.lr=0.25"]
    if "rank" in inspect.signature(getattr(optim, name)).parameters:
        chosen.append("--optimizer.rank=1")  # as the weight is small
    cli = LightningCLI(
        Fitted,
        save_config_callback=None,
        args=["fit", "--seed_everything=0", *(f"--trainer.{flag}" for flag in flags), *chosen],
    )
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is getattr(optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert cli.trainer.global_step == 2
