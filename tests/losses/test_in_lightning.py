"""Losses in a LightningModule: one process, DDP, FSDP2, and by dotted path in a LightningCLI."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ext import losses
from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.losses import CLIPLoss, SigLIPLoss

every_name = pytest.mark.parametrize("name", losses.__all__)


class Pairs(LightningModule):
    """Two linear encoders.

    Args:
        loss: Of features of images and texts.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.image, self.text = nn.Linear(6, 5), nn.Linear(6, 5)
        self.loss = loss
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keeps the loss."""
        loss = self.loss(self.image(batch[0]), self.text(batch[1]))
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def batches(ranks: int) -> DataLoader[Any]:
    """The next 12 pairs each time, of all ranks together."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 48, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, x + noise)
    rank = int(os.environ.get("RANK", "0"))
    sampler: Any = DistributedSampler(data, ranks, rank, shuffle=False)
    return DataLoader(data, batch_size=12 // ranks, sampler=sampler)


Fitted = tuple[list[float], dict[str, Tensor]]


def fitted(name: str, ranks: int, **kwargs: Any) -> Fitted:
    module = Pairs(getattr(losses, name)()).double()
    run = trainer(limit_val_batches=0, use_distributed_sampler=False, **kwargs)
    run.fit(module, batches(ranks))
    return module.seen, {k: whole(v) for k, v in module.state_dict().items()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def by_ddp(name: str) -> Fitted:
    return fitted(name, 2, strategy="ddp", devices=2)


@every_name
def test_ddp_is_one_process_also_with_accumulated_gradients(name: str) -> None:
    seen, weights = fitted(name, 1)
    assert len(seen) == 8  # of 4 steps
    for own_seen, own_weights in run_distributed(by_ddp, args=(name,)):
        assert own_seen == pytest.approx(seen, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)


def by_fsdp2(name: str) -> Fitted:
    return fitted(name, 2, strategy="fsdp2", devices=2)


@pytest.mark.parametrize("name", ["CLIPLoss", "SigLIPLoss"])
def test_fsdp2_is_one_process(name: str) -> None:
    seen, weights = fitted(name, 1)
    for own_seen, own_weights in run_distributed(by_fsdp2, args=(name,)):
        assert own_seen == pytest.approx(seen, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(own_weights, weights, rtol=1e-12, atol=1e-12)


def under_adaptive_batch_size(name: str, drop_last: bool) -> list[float]:
    """Of 21 pairs, 8 a time on both ranks together."""
    data = TensorDataset(*torch.randn(2, 21, 6).unbind())
    module = Pairs(getattr(losses, name)())
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    adaptive = AdaptiveBatchSize("0:8", max_micro_batch=4)
    run = trainer(limit_val_batches=0, accumulate_grad_batches=1, callbacks=[adaptive], **options)
    run.fit(module, DataLoader(data, batch_size=4, drop_last=drop_last))
    return module.seen


@every_name
def test_under_adaptive_batch_size_the_last_batch_is_dropped(name: str) -> None:
    one, other = run_distributed(under_adaptive_batch_size, args=(name, True))
    assert one == other
    assert len(one) == 4  # 2 of 8 in each of 2 epochs


def test_under_adaptive_batch_size_an_uneven_last_batch_is_refused_with_a_hint() -> None:
    for error in run_distributed(
        under_adaptive_batch_size, args=("CLIPLoss", False), return_exceptions=True
    ):
        assert isinstance(error, ValueError)
        assert "rank 0: (3, 5)" in str(error)
        assert "rank 1: (2, 5)" in str(error)
        assert "DataLoader(drop_last=True)" in str(error)


@every_name
def test_it_trains_in_a_trainer(name: str) -> None:
    seen, weights = fitted(name, 1, max_epochs=10, accumulate_grad_batches=1)
    assert sum(seen[-4:]) < sum(seen[:4])
    assert [key for key in weights if key.startswith("loss.")] == [
        f"loss.{key}" for key in getattr(losses, name)().state_dict()
    ]


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


def of_cli(args: list[str]) -> Any:
    cli = LightningCLI(Pairs, run=False, save_config_callback=None, args=args)
    return cli.model.loss


@every_name
def test_a_dotted_path_is_enough(options: list[str], name: str) -> None:
    loss = of_cli([*options, f"--model.loss=lightning_ext.losses.{name}"])
    assert type(loss) is getattr(losses, name)


def test_a_config_file_sets_arguments(options: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n"
        "  loss:\n"
        "    class_path: lightning_ext.losses.SigLIPLoss\n"
        "    init_args: {scale: 5.0, bias: -4, gather_features: false, fused: null}\n",
        "utf-8",
    )
    loss = of_cli([*options, f"--config={config}"])
    assert isinstance(loss, SigLIPLoss)
    assert (loss.scale.item(), loss.bias.item()) == (pytest.approx(5), -4)
    assert not loss.gather_features


def test_arguments_on_the_command_line(options: list[str]) -> None:
    own = ["--model.loss=lightning_ext.losses.CLIPLoss", "--model.loss.temperature=0.05"]
    loss = of_cli([*options, *own, "--model.loss.learnable=false"])
    assert isinstance(loss, CLIPLoss)
    assert loss.scale.item() == pytest.approx(20)
    assert not loss.log_scale.requires_grad
