"""What FSDP2Strategy writes beside parameters, and what it says of files that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.fsdp2_parts import by_fsdp2, by_one
from harness.mixed_module import ACCUMULATE, Mixed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ext.callbacks import EMA
from lightning_ext.strategies import FSDP2Strategy

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
EPOCH = 3 * ACCUMULATE
FOLDER_OR_FILE = pytest.mark.parametrize("in_parts", [True, False], ids=["folder", "file"])


class Write(Callback):
    """Leaves a checkpoint, a weights-only one and an export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "all.ckpt")
        trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
        trainer.strategy.export(self.folder / "export.ckpt")  # type: ignore[attr-defined]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


class Noted(Mixed):
    """Adds to each file what it takes all ranks to know."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ranks"] = self.trainer.strategy.reduce(torch.ones(()), reduce_op="sum")


def written(folder: Path, in_parts: bool, make: Callable[[], LightningModule], *more: Any) -> None:
    how = {"save_distributed_checkpoint": in_parts}
    by_fsdp2(make(), how=how, callbacks=[*more, Write(folder)], limit_train_batches=EPOCH)


@FOLDER_OR_FILE
def test_an_export_hears_the_hook_of_the_module_on_all_ranks(
    in_parts: bool, tmp_path: Path
) -> None:
    run_distributed(written, args=(tmp_path, in_parts, Noted))
    assert read(tmp_path / "export.ckpt")["ranks"] == 2


def with_average(folder: Path) -> None:
    written(folder, False, Mixed, EMA(0.5, export=True))


def test_an_export_is_what_a_weights_only_file_holds(tmp_path: Path) -> None:
    run_distributed(with_average, args=(tmp_path,))
    exported, saved = read(tmp_path / "export.ckpt"), read(tmp_path / "weights.ckpt")
    assert exported.keys() == saved.keys()
    raw = read(tmp_path / "all.ckpt")["state_dict"]
    for name, weight in saved["state_dict"].items():
        assert torch.equal(exported["state_dict"][name], weight)
    assert not torch.equal(exported["state_dict"]["embedding.weight"], raw["embedding.weight"])


class TensorRate(Mixed):
    """A setting of a group is a tensor."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.25))


def rate_of_a_resumed_run(folder: Path) -> Any:
    written(folder, True, TensorRate)
    module = TensorRate()
    module.configure_optimizers = lambda: torch.optim.Adam(  # type: ignore[method-assign]
        module.parameters(), lr=torch.tensor(0.5)
    )
    by_fsdp2(module, 4, ckpt_path=str(folder / "all.ckpt"), limit_train_batches=EPOCH)
    return module.trainer.optimizers[0].param_groups[0]["lr"]


def test_a_setting_that_is_a_tensor_goes_on(tmp_path: Path) -> None:
    for rate in run_distributed(rate_of_a_resumed_run, args=(tmp_path,)):
        assert isinstance(rate, Tensor)
        assert rate == 0.25


class Normed(Mixed):
    """Ranks see other data, and have other statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(4))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for norm in self.norms:
            norm.running_mean.fill_(1.0 + self.global_rank)  # type: ignore[operator]


def means_of_a_resumed_run(folder: Path, in_parts: bool) -> tuple[list[float], list[float]]:
    module = Normed()
    by_fsdp2(module, 1, how={"save_distributed_checkpoint": in_parts}, callbacks=[Write(folder)])
    own = [float(norm.running_mean[0]) for norm in module.norms]  # type: ignore[index]
    again = Normed()
    by_fsdp2(again, 1, ckpt_path=str(folder / "all.ckpt"))
    return own, [float(norm.running_mean[0]) for norm in again.norms]  # type: ignore[index]


@FOLDER_OR_FILE
def test_buffers_are_saved_as_rank_0_has_them(in_parts: bool, tmp_path: Path) -> None:
    ends = run_distributed(means_of_a_resumed_run, args=(tmp_path, in_parts))
    for rank, (own, loaded) in enumerate(ends):
        assert own == [1.0 + rank] * 4
        assert loaded == [1.0] * 4
    exported = read(tmp_path / "export.ckpt")["state_dict"]
    assert all(exported[f"norms.{i}.running_mean"].eq(1.0).all() for i in range(4))


class Fewer(Mixed):
    """Its optimizer has one parameter."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([self.embedding.weight])


def from_a_file_of_more(path: Path) -> None:
    by_fsdp2(Fewer(), 4, ckpt_path=str(path))


def test_a_file_with_states_of_more_parameters_is_refused_in_words(tmp_path: Path) -> None:
    by_one(Mixed("adamw"), 1, callbacks=[SaveWhole(tmp_path)])
    with pytest.raises(MisconfigurationException, match=r"groups of \[20\] parameters and \[1\]"):
        run_distributed(from_a_file_of_more, args=(tmp_path / "all.ckpt",))


class SaveWhole(Write):
    """Leaves the checkpoint alone."""

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "all.ckpt")


@pytest.mark.parametrize("call", ["units", "communication", "view", "export"])
def test_before_a_trainer_has_set_it_up_it_says_so(call: str) -> None:
    args = ("x",) if call == "export" else ()
    with pytest.raises(RuntimeError, match="FSDP2Strategy has no module yet: a Trainer"):
        getattr(FSDP2Strategy(), call)(*args)
