"""What pipelines write into files, what Trainers do with them, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import COUNT, MICRO, Chain, data, loaders, pipeline_trainer, whole
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ext.strategies import PipelineStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
FOLDER_OR_FILE = pytest.mark.parametrize("in_parts", [True, False], ids=["folder", "file"])


class Rich(Chain):
    """Has a weight twice, buffers, something frozen, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4][0].weight = self.net[0][0].weight
        self.net[1][0].bias.requires_grad_(False)
        self.net[3].register_buffer("scale", torch.full((2,), 3.0))
        self.net[3].register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("offset", torch.full((3,), 4.0))
        self.net[2] = Remembers()


class Remembers(nn.Tanh):
    """Saves a word, which tells whether it has run."""

    word = "nothing"

    def forward(self, x: Tensor) -> Tensor:
        """As ever."""
        self.word = "something"
        return super().forward(x)

    def get_extra_state(self) -> Any:
        """It alone."""
        return {"word": self.word}

    def set_extra_state(self, state: Any) -> None:
        """It alone."""
        self.word = state["word"]


class Write(Callback):
    """Leaves a checkpoint, a weights-only one and an export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "all.ckpt")
        trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
        if isinstance(trainer.strategy, PipelineStrategy):
            trainer.strategy.export(self.folder / "export.ckpt")


def by_one(module: LightningModule, *callbacks: Callback, **kwargs: Any) -> Trainer:
    path = kwargs.pop("ckpt_path", None)
    run = trainer(callbacks, **{"accumulate_grad_batches": 1, "max_epochs": -1, **kwargs})
    batches = DataLoader(data(), MICRO * COUNT)
    run.fit(module, batches, batches, ckpt_path=path)
    return run


def by_pipeline(
    module: LightningModule, in_parts: bool, *callbacks: Callback, **kwargs: Any
) -> Trainer:
    path = kwargs.pop("ckpt_path", None)
    own = {"accumulate_grad_batches": 1, "max_epochs": -1, "callbacks": list(callbacks)}
    run = pipeline_trainer({"save_distributed_checkpoint": in_parts}, **(own | kwargs))
    run.fit(module, *loaders(), ckpt_path=path)
    return run


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def written(folder: Path, in_parts: bool) -> None:
    by_pipeline(Rich(), in_parts, Write(folder), max_steps=2)


def test_a_file_is_one_processs_in_all_but_rounding(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    by_one(Rich(), Write(tmp_path / "one"), max_steps=2)
    run_distributed(written, args=(tmp_path, False))
    own, other = read(tmp_path / "all.ckpt"), read(tmp_path / "one" / "all.ckpt")
    assert list(own) == list(other)
    assert list(own["state_dict"]) == list(other["state_dict"])
    for name in ("loops", "callbacks", "lr_schedulers", "epoch", "global_step"):
        assert str(own[name]) == str(other[name])
    assert_close(own["state_dict"], other["state_dict"])
    assert_close(own["optimizer_states"], other["optimizer_states"])


def assert_close(own: Any, other: Any) -> None:
    assert type(own) is type(other)
    if isinstance(own, Tensor):
        assert own.dtype == other.dtype
        assert torch.allclose(own, other, rtol=0, atol=1e-12)
    elif isinstance(own, dict):
        assert own.keys() == other.keys()
        for name in own:
            assert_close(own[name], other[name])
    elif isinstance(own, list):
        for one, another in zip(own, other, strict=True):
            assert_close(one, another)
    else:
        assert own == other


def test_a_weight_with_two_names_is_in_a_file_once(tmp_path: Path) -> None:
    run_distributed(written, args=(tmp_path, False))
    weights = read(tmp_path / "all.ckpt")["state_dict"]
    first, last = weights["net.0.0.weight"], weights["net.4.0.weight"]
    assert first.data_ptr() == last.data_ptr()


def start_of_a_resumed_run(path: Path) -> tuple[dict[str, Tensor], str]:
    module = Rich()
    for value in [*module.parameters(), *module.buffers()]:
        value.data.zero_()
    by_pipeline(module, False, ckpt_path=str(path), max_steps=2)
    tensors = {n: x for n, x in module.state_dict().items() if isinstance(x, Tensor)}
    return tensors, str(module.net[2].word)


@FOLDER_OR_FILE
def test_all_of_a_state_dict_comes_back(in_parts: bool, tmp_path: Path) -> None:
    run_distributed(written, args=(tmp_path, in_parts))
    exported = read(tmp_path / "export.ckpt")["state_dict"]
    names = set()
    for own, word in run_distributed(start_of_a_resumed_run, args=(tmp_path / "all.ckpt",)):
        names |= own.keys()
        assert word == "something"  # on both ranks, of which one has written it
        assert all(torch.equal(value, exported[name]) for name, value in own.items())
    assert names | {"net.2._extra_state"} == exported.keys()


@FOLDER_OR_FILE
def test_an_export_is_read_by_load_from_checkpoint(in_parts: bool, tmp_path: Path) -> None:
    run_distributed(written, args=(tmp_path, in_parts))
    loaded = Rich.load_from_checkpoint(tmp_path / "export.ckpt").state_dict()
    exported = read(tmp_path / "export.ckpt")
    assert "optimizer_states" not in exported
    assert list(loaded) == list(exported["state_dict"])
    assert loaded["net.2._extra_state"] == {"word": "something"}


def resumed(folder: Path, in_parts: bool) -> tuple[Any, Any]:
    """A fit that was stopped within its first epoch, and one that went on from the second."""
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"max_steps": 7, "enable_checkpointing": True}
    straight = Chain()
    by_pipeline(straight, in_parts, save, **options)
    within, after = Chain(), Chain()
    by_pipeline(within, in_parts, ckpt_path=str(folder / "step=3.ckpt"), max_steps=7)
    by_pipeline(after, in_parts, ckpt_path=str(folder / "step=4.ckpt"), max_steps=7)
    same = all(torch.equal(p, whole(after)[n]) for n, p in whole(straight).items())
    return same, whole(within)


@FOLDER_OR_FILE
def test_a_run_goes_on_bitwise_and_within_an_epoch_as_one_process_does(
    in_parts: bool, tmp_path: Path
) -> None:
    module, again = Chain(), Chain()
    save = ModelCheckpoint(tmp_path / "one", "{step}", every_n_train_steps=3, save_top_k=-1)
    by_one(module, save, max_steps=3, enable_checkpointing=True)
    by_one(again, ckpt_path=str(tmp_path / "one" / "step=3.ckpt"), max_steps=7)
    for same, within in run_distributed(resumed, args=(tmp_path / "parts", in_parts)):
        assert same
        for name, parameter in within.items():
            assert torch.allclose(parameter, again.get_parameter(name), rtol=0, atol=1e-12)


def kept(folder: Path, monitor: str, in_parts: bool) -> tuple[list[str], list[Any], float]:
    save = ModelCheckpoint(folder, "{epoch}", monitor=monitor, save_top_k=2, save_last=True)
    stop = EarlyStopping("val_loss", min_delta=10.0, patience=3)
    module = Chain()
    run = by_pipeline(module, in_parts, save, stop, max_epochs=9, enable_checkpointing=True)
    best = str(save.best_model_path)
    found = [run.validate(module, loaders()[1], ckpt_path="best", verbose=False)]
    fresh = pipeline_trainer()
    found.append(fresh.validate(Chain(), loaders()[1], ckpt_path=best, verbose=False))
    return sorted(x.name for x in folder.iterdir()), found, float(save.best_model_score or 0)


@FOLDER_OR_FILE
def test_the_best_are_kept_and_validated_and_all_ranks_stop(in_parts: bool, tmp_path: Path) -> None:
    for names, losses, score in run_distributed(kept, args=(tmp_path, "val_loss", in_parts)):
        assert names == ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"]
        assert all(one[0]["val_loss"] == pytest.approx(score, abs=1e-12) for one in losses)


def test_checkpoints_are_chosen_by_what_training_logs(tmp_path: Path) -> None:
    for names, *_ in run_distributed(kept, args=(tmp_path, "loss", False)):
        assert names == ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"]


class WriteValidated(Callback):
    """Leaves a checkpoint while weights are still put together for the evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def written_after_a_validation(folder: Path, in_parts: bool) -> tuple[float, float]:
    options: dict[str, Any] = {"data_parallel_size": 2, "schedule": "gpipe"}
    options["save_distributed_checkpoint"] = in_parts
    path, module = folder / "own.ckpt", Chain()
    own = {"accumulate_grad_batches": 1, "max_steps": 4, "max_epochs": -1}
    run = pipeline_trainer(options, callbacks=[WriteValidated(path)], **own)
    run.fit(module, *loaders(2))
    fitted = float(run.callback_metrics["val_loss"])
    run.callbacks.pop()
    (before,) = run.validate(module, loaders()[1], ckpt_path=str(folder / "all.ckpt"))
    (after,) = run.validate(module, loaders()[1], ckpt_path=str(path))
    assert after["val_loss"] == fitted
    return fitted, before["val_loss"]


@FOLDER_OR_FILE
def test_after_a_validation_it_is_saved_and_loaded_as_ever(in_parts: bool, tmp_path: Path) -> None:
    other = by_one(Chain(), Write(tmp_path), max_steps=1)
    (expected,) = other.validate(other.lightning_module, DataLoader(data(), MICRO * COUNT))
    fitted = by_one(Chain(), max_steps=4).callback_metrics["val_loss"]
    args = (tmp_path, in_parts)
    for own, before in run_distributed(written_after_a_validation, 4, args=args):
        assert own == pytest.approx(float(fitted), abs=1e-12)
        assert before == pytest.approx(expected["val_loss"], abs=1e-12)


class Evaluated(Chain):
    """Has steps to test and to predict."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean score."""
        self.log("score", self(batch[0]).mean(), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Scores."""
        return self(batch[0])


def evaluated(path: Path) -> tuple[float, Tensor]:
    run, module, batches = pipeline_trainer(), Evaluated(), loaders()[1]
    (found,) = run.test(module, batches, ckpt_path=str(path), verbose=False)
    for one in module.parameters():
        one.data.zero_()
    return found["score"], torch.cat(run.predict(module, batches, ckpt_path=str(path)))


def test_tests_and_predictions_are_of_the_checkpoint(tmp_path: Path) -> None:
    module = Evaluated()
    by_one(module, Write(tmp_path), max_steps=2)
    with torch.no_grad():
        expected = module(data().tensors[0])
    for score, found in run_distributed(evaluated, args=(tmp_path / "weights.ckpt",)):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        assert score == pytest.approx(float(expected.mean()), abs=1e-6)
