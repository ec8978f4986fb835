"""EMA and AdaptiveBatchSize under FSDP2, by Lightning's strategy and by ours, against DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    Classifier,
    assert_accurate,
    dataset,
    fit,
    fsdp2,
    fsdp2_strategy,
    run_distributed,
    shard,
)
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext.callbacks import EMA, AdaptiveBatchSize
from lightning_ext.data import AdaptiveBatchSampler


class Module(Classifier):
    """In float64; it keeps what validation finds."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.double()
        self.validated: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        self.validated.append(nn.functional.cross_entropy(self.net(x), y).item())


class Sharded(Module):
    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            shard(self.net, self.device_mesh)


class SaveInValidation(Callback):
    """Where the average is in the module."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_epoch_end(self, run: Any, module: Any) -> None:
        run.save_checkpoint(self.path)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: x.full_tensor() if isinstance(x, DTensor) else x.clone()
        for name, x in tensors.items()
    }


def train(kind: str, *others: Callback, one_file: bool = True, **kwargs: Any) -> Any:
    """Two epochs, or more from a checkpoint; the batch doubles on the way."""
    data = dataset(96, torch.float64)
    loader = DataLoader(data, batch_sampler=AdaptiveBatchSampler(SequentialSampler(data), 4))
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not one_file)
        settings = fsdp2(2) | {"strategy": strategy}
    elif kind == "ours":
        settings = fsdp2_strategy(2, save_distributed_checkpoint=not one_file)
    ema = EMA(0.9)
    module, run = fit(
        [ema, AdaptiveBatchSize("0:8 24:16"), *others],
        module=Sharded() if kind == "fsdp2" else Module(),
        train=loader,
        val=DataLoader(data, batch_size=8),
        accumulate_grad_batches=1,
        **settings | {"max_epochs": 2, **kwargs},
    )
    assert ema._average is not None
    return ema, module, run, whole(ema._average._tensors)


def trained(kind: str, folder: Path, one_file: bool = True) -> Any:
    ema, module, run, average = train(kind, one_file=one_file)
    run.save_checkpoint(folder / "last.ckpt")
    ema.export(folder / "average.ckpt")
    weights = whole(dict(module.named_parameters()))
    again = str(folder / "last.ckpt")
    after, resumed, _, later = train(kind, one_file=one_file, max_epochs=3, ckpt_path=again)
    return {
        "seen": module.seen + resumed.seen,
        "validated": torch.tensor(module.validated + resumed.validated, dtype=torch.float64),
        "weights": weights,
        "average": average,
        "after resuming": later,
        "updates": (ema.updates, after.updates),
    }


kinds = pytest.mark.parametrize("kind", ["fsdp2", "ours"])


@kinds
@pytest.mark.parametrize("one_file", [True, False], ids=["one file", "distributed"])
def test_the_average_is_that_of_ddp(one_file: bool, kind: str, tmp_path: Path) -> None:
    found = run_distributed(trained, args=(kind, tmp_path, one_file))
    expected = run_distributed(trained, args=("ddp", tmp_path / "ddp"))
    for mine, other in zip(found, expected, strict=True):
        assert mine["seen"] == other["seen"]
        assert mine["updates"] == other["updates"]
        assert_accurate(mine["validated"], other["validated"])
        for kind in ("weights", "average", "after resuming"):
            for name, tensor in other[kind].items():
                assert_accurate(mine[kind][name], tensor)


@kinds
def test_files_hold_whole_tensors(kind: str, tmp_path: Path) -> None:
    found = run_distributed(trained, args=(kind, tmp_path))[0]
    exported = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    (average,) = saved["lightning_ext.ema"].values()
    for name, tensor in found["average"].items():
        assert torch.equal(exported[name], tensor)
        assert torch.equal(average[name], tensor)
        assert torch.equal(saved["state_dict"][name], found["weights"][name])


def saved_in_validation(kind: str, folder: Path) -> Any:
    _, module, _, average = train(kind, SaveInValidation(folder / "in_validation.ckpt"))
    return whole(dict(module.named_parameters())), average


@kinds
def test_a_checkpoint_saved_in_validation_holds_the_raw_weights(kind: str, tmp_path: Path) -> None:
    weights, average = run_distributed(saved_in_validation, args=(kind, tmp_path))[0]
    saved = torch.load(tmp_path / "in_validation.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert not any(torch.equal(saved[name], average[name]) for name in weights)
