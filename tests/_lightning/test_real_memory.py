"""Allocations that really fail, on the host and on a device, are recovered from."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_accurate, fit, run_distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import recover_from_oom

MEBIBYTE = 2**20
WIDTH = MEBIBYTE // 32  # a quarter of a mebibyte in float64


class Wide(LightningModule):
    """Keeps a mebibyte per sample for the backward pass, and more on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        hidden = x[:, None] * self.scale
        for _ in range(3):
            hidden = hidden.sin()
        return hidden.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Recover(Callback):
    def __init__(self) -> None:
        self.ceilings: list[int] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.handle = recover_from_oom(trainer, on_split=self.ceilings.append)


def trained(recover: Recover, **kwargs: Any) -> Tensor:
    rows = torch.linspace(0.1, 1.0, 96, dtype=torch.float64)
    data = DataLoader(TensorDataset(rows), batch_size=64)
    module, _ = fit([recover], module=Wide(), train=data, max_epochs=1, **kwargs)
    return module.scale.detach().cpu()


def limited(mebibytes: int | None) -> tuple[list[int], Tensor]:
    if mebibytes is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + mebibytes * MEBIBYTE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    recover = Recover()
    scale = trained(recover)
    return recover.ceilings, scale[:: WIDTH // 8].clone()


@pytest.mark.filterwarnings("ignore:A micro-batch of .* ran out of memory:UserWarning")
def test_a_host_allocation_that_fails() -> None:
    ((ceilings, scale),) = run_distributed(limited, 1, args=(60,))
    ((unlimited, expected),) = run_distributed(limited, 1, args=(None,))
    assert unlimited == []
    assert ceilings[-1] in (8, 16, 32)
    assert_accurate(scale, expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:A micro-batch of .* ran out of memory:UserWarning")
def test_a_device_allocation_that_fails() -> None:
    on_gpu = {"accelerator": "gpu", "devices": 1}
    whole, parts = Recover(), Recover()
    expected = trained(whole, **on_gpu)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(60 * MEBIBYTE / total)
    try:
        scale = trained(parts, **on_gpu)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert whole.ceilings == []
    assert parts.ceilings[-1] in (8, 16, 32)
    assert_accurate(scale, expected)
