"""Checkpoints written under one strategy and number of ranks, read under others."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_distributed, trainer
from harness.mixed_module import ACCUMULATE, Mixed, batches
from harness.strategy_cases import Case, Weights, distance, trained, whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_ext.optim import LAMB
from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy

# A reader has no use for the settings of the callback that wrote.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
SAVED, STEPS = 2, 5
KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),  # without a state
    "lamb": lambda groups: LAMB(groups, lr=1e-2),
}


class Grouped(Mixed):
    """Groups that do not follow the module's order, and leave the frozen parameter out."""

    def __init__(self, kind: str = "adamw") -> None:
        super().__init__()
        self.kind = kind
        self.double()

    def configure_optimizers(self) -> Optimizer:
        """Matrices of layers from the last to the first, and then the others."""
        layers = [p for layer in reversed(self.layers) for p in layer.parameters() if p.ndim > 1]
        taken = {id(one) for one in layers}
        others = [p for p in self.parameters() if id(p) not in taken and p.requires_grad]
        groups = [{"params": layers}, {"params": others, "weight_decay": 0.0, "trust_ratio": False}]
        return KINDS[self.kind](groups)


class How(NamedTuple):
    """A strategy on so many ranks."""

    world: int
    make: Callable[[], Any]
    reads_folders: bool = True


def _zeropp(**kwargs: Any) -> ZeroPPStrategy:
    return ZeroPPStrategy(quantize_weights=False, quantize_gradients=False, **kwargs)


RUNS = {
    "one process": How(1, lambda: "auto", reads_folders=False),
    "ddp": How(2, lambda: DDPStrategy(find_unused_parameters=True), reads_folders=False),
    "fsdp2 on 1": How(1, FSDP2Strategy),
    "fsdp2 on 2": How(2, FSDP2Strategy),
    "fsdp2 on 4": How(4, FSDP2Strategy),
    "fsdp2 2 x 2": How(4, lambda: FSDP2Strategy(device_mesh=(2, 2))),
    "fsdp2 in a file": How(2, lambda: FSDP2Strategy(save_distributed_checkpoint=False)),
    "zeropp on 4": How(4, lambda: _zeropp(ranks_per_node=2)),
    "zeropp in a file": How(2, lambda: _zeropp(save_distributed_checkpoint=False)),
}
SLOW = dict.fromkeys(("fsdp2 on 4", "fsdp2 2 x 2", "fsdp2 in a file"), pytest.mark.slow)


class Start(Callback):
    """Keeps the weights that a fit goes on with."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.weights = {name: whole(p).detach().clone() for name, p in module.named_parameters()}


def fitted(run: str, kind: str, steps: int, *callbacks: Callback, **kwargs: Any) -> Weights:
    case = Case(lambda world: RUNS[run].make())
    options = {"limit_train_batches": SAVED * ACCUMULATE, "gradient_clip_val": 0.5}
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    options |= {"enable_checkpointing": saves, "callbacks": list(callbacks)}
    return trained(case, Grouped(kind), steps, **(options | kwargs)).weights


def write(run: str, kind: str, folder: Path) -> Weights:
    save = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED)
    return fitted(run, kind, SAVED, save)


def read(run: str, kind: str, paths: list[Path]) -> list[tuple[Weights, Weights]]:
    found = []
    for path in paths:
        start = Start()
        found.append((fitted(run, kind, STEPS, start, ckpt_path=str(path)), start.weights))
    return found


@functools.cache
def straight(kind: str) -> Weights:
    return fitted("one process", kind, STEPS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Weights]]:
    """Has a run write a checkpoint, once."""

    @functools.cache
    def make(run: str, kind: str) -> tuple[Path, Weights]:
        folder = tmp_path_factory.mktemp("written")
        weights = run_distributed(write, RUNS[run].world, args=(run, kind, folder))[0]
        return folder / "saved.ckpt", weights

    return make


Written = Callable[[str, str], tuple[Path, Weights]]


def is_readable(writer: str, reader: str) -> bool:
    return RUNS[reader].reads_folders or writer in ("one process", "ddp") or "file" in writer


@pytest.mark.parametrize("reader", [pytest.param(x, marks=SLOW.get(x, ())) for x in RUNS])
def test_whoever_wrote_it_weights_are_the_same_and_states_go_on(
    reader: str, written: Written
) -> None:
    sources = [written(run, "adamw") for run in RUNS if is_readable(run, reader)]
    assert {path.is_dir() for path, _ in sources} == (
        {True, False} if len(sources) > 4 else {False}
    )
    paths = [path for path, _ in sources]
    for ends in run_distributed(read, RUNS[reader].world, args=(reader, "adamw", paths)):
        for (after, before), (_, saved) in zip(ends, sources, strict=True):
            assert distance(before, saved) == 0
            assert distance(after, straight("adamw")) <= 1e-12


@pytest.mark.filterwarnings("ignore:LAMB")
@pytest.mark.parametrize("kind", ["sgd", "lamb"])
def test_states_of_other_optimizers_go_on(kind: str, written: Written) -> None:
    for writer, reader in (
        ("fsdp2 on 2", "fsdp2 on 4"),
        ("fsdp2 in a file", "one process"),
        ("ddp", "fsdp2 on 2"),
    ):
        path, _ = written(writer, kind)
        ((after, _),) = run_distributed(read, RUNS[reader].world, args=(reader, kind, [path]))[0]
        assert distance(after, straight(kind)) <= 1e-12


class SaveFirst(Callback):
    """Saves before the first step, and between two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "first.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / "between.ckpt")


def saving(run: str, folder: Path) -> tuple[Weights, Weights, Weights]:
    kept = fitted(run, "adamw", 3, SaveFirst(folder), limit_train_batches=1.0)
    first = fitted(run, "adamw", 3, limit_train_batches=1.0, ckpt_path=str(folder / "first.ckpt"))
    return kept, fitted(run, "adamw", 3, limit_train_batches=1.0), first


@pytest.mark.parametrize("run", ["fsdp2 on 2", "fsdp2 in a file"])
def test_saving_changes_nothing_even_before_the_first_step(run: str, tmp_path: Path) -> None:
    for saved, unsaved, from_first in run_distributed(saving, args=(run, tmp_path)):
        assert distance(saved, unsaved) == 0
        assert distance(from_first, unsaved) == 0


class Dies(nn.Module):
    """Cannot be saved."""

    def __reduce__(self) -> Any:
        raise KeyError("while it is saved")


def interrupted(folder: Path) -> Any:
    class Spoil(Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
            if trainer.global_step > SAVED:
                checkpoint["spoilt"] = Dies()

    save = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED, enable_version_counter=False)
    path = folder / "saved.ckpt"
    with pytest.raises(KeyError, match="while it is saved"):
        fitted("fsdp2 on 1", "adamw", STEPS, save, Spoil())
    start = Start()
    fitted("fsdp2 on 1", "adamw", SAVED + 1, start, ckpt_path=str(path))
    return start.weights


def test_a_checkpoint_is_replaced_only_by_a_whole_one(tmp_path: Path, written: Written) -> None:
    _, saved = written("fsdp2 on 1", "adamw")
    (found,) = run_distributed(interrupted, 1, args=(tmp_path,))
    assert distance(found, saved) == 0


class Validated(Grouped):
    """Logs what checkpoints are chosen by."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = Mixed.training_step(self, batch, batch_idx)
        self.log("val_loss", loss, sync_dist=True)


def kept(folder: Path) -> list[str]:
    save = ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    options: dict[str, Any] = {"limit_train_batches": 4, "limit_val_batches": 1}
    options |= {"use_distributed_sampler": False}
    run = trainer(
        [save], strategy="fsdp2", devices=2, max_epochs=4, enable_checkpointing=True, **options
    )
    run.fit(Validated(), batches(), batches())
    found = sorted(one.name for one in folder.iterdir())
    run.validate(Validated(), batches(), ckpt_path="best", verbose=False)
    return found


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    for found in run_distributed(kept, args=(tmp_path,)):
        assert found == ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"]


class Other(Grouped):
    """Its names and shapes differ from those of the checkpoint."""

    def __init__(self, change: str) -> None:
        super().__init__()
        if change == "lacks":
            self.more = nn.Linear(2, 2)
        elif change == "has besides":
            del self.unused
        else:
            self.unused = nn.Linear(3, 2)
        self.strict_loading = change != "has besides, allowed"
        self.double()


def read_other(change: str, path: Path, fitting: bool) -> None:
    module = Other(change)
    run = trainer(strategy=FSDP2Strategy(), devices=2, max_steps=9)
    if fitting:
        run.fit(module, batches(), ckpt_path=str(path))
    else:
        run.predict(module, batches(), ckpt_path=str(path))


@pytest.mark.parametrize("writer", ["fsdp2 on 2", "one process"])
@pytest.mark.parametrize("fitting", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("lacks", r"it lacks more\.bias, more\.weight"),
        ("has besides", r"it has besides unused\.bias, unused\.weight"),
        ("has in other shapes", r"in other shapes unused\.bias \(1,\) and not \(2,\)"),
    ],
)
def test_what_does_not_fit_is_told_by_name(
    change: str, told: str, fitting: bool, writer: str, written: Written
) -> None:
    path, _ = written(writer, "adamw")
    ends = run_distributed(read_other, args=(change, path, fitting), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2, ends
    assert all(re.search(told, str(end)) for end in ends)


def weights_only(folder: Path) -> None:
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_weights_only=True)
    fitted("fsdp2 on 2", "adamw", SAVED, save)
    fitted("fsdp2 on 2", "adamw", STEPS, ckpt_path=str(folder / f"step={SAVED}.ckpt"))


def test_weights_alone_do_not_resume_a_fit(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"states of 0 optimizers.*save_weights_only"):
        run_distributed(weights_only, args=(tmp_path,))


def nowhere() -> None:
    fitted("fsdp2 on 2", "adamw", 1, ckpt_path="/nowhere/last.ckpt")


def test_a_path_without_a_checkpoint_is_refused() -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run_distributed(nowhere)
