"""Optimizers in a Trainer under FSDP2Strategy, with accumulation and clipping, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed, trainer
from harness._optimizer_case import Net, groups_of
from harness.optimizer_cases import CASES
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.strategies import FSDP2Strategy

SAMPLES, MICRO_BATCH = 48, 4
REFUSED = ("VRGD",)
SHARDED = [n for n, x in CASES.items() if x.sharded and x.automatic and n not in REFUSED]


class Module(LightningModule):
    """The net of the contract, trained by one of its optimizers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self.name = Net(), name

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_callbacks(self) -> list[Any]:
        return CASES[self.name].callbacks()

    def configure_optimizers(self) -> Optimizer:
        case = CASES[self.name]
        return case.make(self.net, groups_of(self.net, case.lr))


def first_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.in_features == 5


def data(ranks: int) -> DataLoader[Any]:
    """Micro-batches in turn, so that a window is of the same samples on any number of ranks."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 5, generator=draw, dtype=torch.float64)
    found = [list(range(i, i + MICRO_BATCH)) for i in range(0, SAMPLES, MICRO_BATCH)]
    rank = dist.get_rank() if ranks > 1 else 0
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_sampler=found[rank::ranks])


def fit(name: str, ranks: int, epochs: int, **how: Any) -> Any:
    module = Module(name)
    module.train_dataloader = lambda: data(ranks)
    where = how.pop("ckpt_path", None)
    if ranks > 1:
        how |= {"strategy": FSDP2Strategy(first_layer), "devices": ranks}
    run = trainer(
        accumulate_grad_batches=4 // ranks,
        gradient_clip_val=0.5,
        max_epochs=epochs,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **how,
    )
    run.fit(module, ckpt_path=where)
    return module, run


def train(name: str, ranks: int) -> Tensor:
    return weights(fit(name, ranks, 2)[0])


def weights(module: nn.Module) -> Tensor:
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in found])


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_are_one_process(name: str) -> None:
    truth = train(name, 1)
    for found in run_distributed(train, args=(name, 2)):
        assert (found - truth).norm() <= 1e-10 * truth.norm()


class Save(Callback):
    """Of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, run: Any, module: Any) -> None:
        if run.current_epoch == 1:
            run.save_checkpoint(self.path)


def write(name: str, path: Path) -> Tensor:
    return weights(fit(name, 2, 4, callbacks=[Save(path)])[0])


def read(name: str, ranks: int, path: Path) -> Tensor:
    return weights(fit(name, ranks, 4, ckpt_path=path)[0])


def check_that_it_goes_on(name: str, ranks: int, path: Path) -> None:
    truth = run_distributed(write, args=(name, path))[0]
    for found in run_distributed(read, ranks, args=(name, ranks, path)):
        assert (found - truth).norm() <= 1e-12 * truth.norm()


@pytest.mark.parametrize(
    "name",
    ["AccumAdam", "AdaGradNorm", "DelayCompensation", "LAWN", "MKORH", "MTAdamW", "PolyakSGD"],
)
def test_a_checkpoint_goes_on(name: str, tmp_path: Path) -> None:
    check_that_it_goes_on(name, 2, tmp_path / "half")


@pytest.mark.parametrize("name", ["LAMB", "NorMuon"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_checkpoint_goes_on_with_other_ranks(name: str, ranks: int, tmp_path: Path) -> None:
    check_that_it_goes_on(name, ranks, tmp_path / "half")


def refusal(name: str) -> str:
    with pytest.raises(TypeError) as caught:
        fit(name, 2, 1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DistributedLion", "FSDP2 averages gradients itself, and leaves nothing to vote on"),
        ("EGN", "it needs derivatives by whole ones"),
    ],
)
def test_what_needs_whole_parameters_is_refused(name: str, reason: str) -> None:
    for text in run_distributed(refusal, args=(name,)):
        assert reason in text


def vrgd(folder: Path | None) -> str:
    with pytest.raises(RuntimeError) as caught:
        fit("VRGD", 2, 2, ckpt_path=None if folder is None else folder / "half.ckpt")
    return str(caught.value)


def test_vrgd_says_that_it_cannot_see_the_passes() -> None:
    # The last micro-batch alone is reduced, and its gradient is that of all: one part, no variance.
    for text in run_distributed(vrgd, args=(None,)):
        assert "saw 1 backward pass" in text
        assert "set_requires_gradient_sync" in text


def test_vrgd_says_so_after_a_checkpoint_of_one_process(tmp_path: Path) -> None:
    _, run = fit("VRGD", 1, 1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    for text in run_distributed(vrgd, args=(tmp_path,)):
        assert "saw 1 backward pass" in text
