"""What files hold, and that training goes on from them as if nothing had happened."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, assert_accurate, dataset, fit, loader, same_weights, trainer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ext.callbacks import EMA, AdaptiveBatchSize

KEY = "lightning_ext.ema"


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def averaged(ema: EMA, module: LightningModule) -> Tensor:
    with ema.swap(module):
        return flat(module)


def one_batch() -> DataLoader[Any]:
    return DataLoader(dataset(4), batch_size=4)


def stored(path: str | Path, ema: EMA | None = None) -> Tensor:
    """Weights in a file: the raw ones, or an average."""
    checkpoint = torch.load(path)
    state = checkpoint["state_dict"] if ema is None else checkpoint[KEY][ema.state_key]
    module = Classifier()
    module.load_state_dict(state)
    return flat(module)


class SaveInValidation(Callback):
    """Writes a checkpoint while the average is in the module."""

    def __init__(self, path: Path, weights_only: bool = False) -> None:
        self.path = path
        self.weights_only = weights_only

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path, weights_only=self.weights_only)


def test_a_checkpoint_holds_the_raw_weights_and_the_average(tmp_path: Path) -> None:
    ema = EMA(0.9)
    module, run = fit([ema])
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(stored(tmp_path / "a.ckpt"), flat(module))
    assert torch.equal(stored(tmp_path / "a.ckpt", ema), averaged(ema, module))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_written_during_validation_holds_the_raw_weights(
    tmp_path: Path, weights_only: bool
) -> None:
    callbacks = [EMA(0.9), EMA(0.5), SaveInValidation(tmp_path / "a.ckpt", weights_only)]
    module, _ = fit(callbacks, val=one_batch())
    assert torch.equal(stored(tmp_path / "a.ckpt"), flat(module))


def test_saving_during_validation_leaves_the_average_in_the_module(tmp_path: Path) -> None:
    class Check(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert torch.equal(flat(pl_module), averaged(ema, pl_module))

    ema = EMA(0.9)
    fit([SaveInValidation(tmp_path / "a.ckpt", True), Check(), ema], val=one_batch())
    assert ema.updates == 24


def test_a_checkpoint_of_shared_weights_in_validation_holds_them_raw(tmp_path: Path) -> None:
    module = Classifier()
    module.net.extend([nn.Linear(3, 12), nn.Linear(12, 3)])
    module.net[5].weight = module.net[3].weight
    fit([EMA(0.9), SaveInValidation(tmp_path / "a.ckpt")], module=module, val=one_batch())
    saved = torch.load(tmp_path / "a.ckpt")["state_dict"]
    for name in ("net.3.weight", "net.5.weight"):
        assert torch.equal(saved[name], module.net[3].weight)


@pytest.mark.parametrize("export", [False, True])
def test_a_weights_only_file_holds_what_export_says(tmp_path: Path, export: bool) -> None:
    ema = EMA(0.9, export=export)
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    module, run = fit([ema, saver], enable_checkpointing=True)
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    wanted = averaged(ema, module) if export else flat(module)
    assert torch.equal(stored(saver.best_model_path), wanted)
    assert torch.equal(stored(tmp_path / "after.ckpt"), wanted)


def test_whole_checkpoints_hold_the_raw_weights_also_with_export(tmp_path: Path) -> None:
    module, run = fit([EMA(0.9, export=True)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(stored(tmp_path / "a.ckpt"), flat(module))


def test_two_exported_averages_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Two EMA callbacks have export=True"):
        fit([EMA(0.9, export=True), EMA(0.5, export=True)])


def test_an_exported_file_loads_as_a_module(tmp_path: Path) -> None:
    ema = EMA(0.9)
    module, _ = fit([ema])
    end = flat(module)
    ema.export(tmp_path / "average.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "average.ckpt")
    assert torch.equal(flat(loaded), averaged(ema, module))
    assert torch.equal(flat(module), end)


def test_an_export_is_of_the_average_that_was_asked(tmp_path: Path) -> None:
    slow, fast = EMA(0.99, export=True), EMA(0.5)
    module, run = fit([slow, fast])
    fast.export(tmp_path / "fast.ckpt")
    run.save_checkpoint(tmp_path / "slow.ckpt", weights_only=True)
    assert torch.equal(stored(tmp_path / "fast.ckpt"), averaged(fast, module))
    assert torch.equal(stored(tmp_path / "slow.ckpt"), averaged(slow, module))


def test_there_is_nothing_to_export_before_training(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="no average to export"):
        EMA(0.9).export(tmp_path / "a.ckpt")


def plain_fit(callbacks: list[Callback], **kwargs: Any) -> tuple[Any, Trainer]:
    """A fit whose samples come in the same order in every epoch, without dropout."""
    seed_everything(0, verbose=False)
    train = loader(shuffle=False, dtype=kwargs.pop("dtype", torch.float32))
    return fit(callbacks, module=Classifier(dropout=0), train=train, **kwargs)


class SaveEveryStep(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step > 0 and not path.exists():
            trainer.save_checkpoint(path)


def averaging(**settings: Any) -> tuple[list[Callback], EMA]:
    ema = EMA(0.9, **settings)
    return [AdaptiveBatchSize("0:8 40:16"), ema], ema


@pytest.mark.parametrize("settings", [{}, {"every_n_steps": 3, "warmup": True}], ids=str)
def test_resumed_after_any_step_it_is_the_uninterrupted_average(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    callbacks, whole = averaging(**settings)
    module, run = fit([*callbacks, SaveEveryStep(tmp_path)])
    for step in range(1, run.global_step):
        callbacks, ema = averaging(**settings)
        resumed, _ = fit(callbacks, ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert same_weights(resumed, module)
        assert torch.equal(averaged(ema, resumed), averaged(whole, module))
        assert ema.state_dict() == whole.state_dict()


class Begin(Callback):
    """Notes what a resumed fit begins with."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.raw, self.average = flat(pl_module), averaged(self.ema, pl_module)


def test_in_double_precision_a_resumed_average_keeps_every_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": torch.float64, "precision": "64-true"}
    path = tmp_path / "a.ckpt"
    module, begun = plain_fit([whole := EMA(0.9)], max_epochs=1, **settings)
    begun.save_checkpoint(path)
    plain_fit([ema := EMA(0.9), begin := Begin(ema)], ckpt_path=str(path), **settings)
    assert begin.average.dtype == torch.float64
    assert torch.equal(begin.average, averaged(whole, module))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_it_goes_on_from_a_checkpoint_of_lightnings_averaging(tmp_path: Path) -> None:
    plain_fit([EMAWeightAveraging(decay=0.9), SaveEveryStep(tmp_path)], max_epochs=1)
    path = tmp_path / "12.ckpt"
    saved = torch.load(path)
    ema = EMA(0.9)
    resumed, _ = plain_fit([ema, begin := Begin(ema)], ckpt_path=str(path))
    held = Classifier()
    held.load_state_dict(saved["current_model_state"])
    assert torch.equal(begin.raw, flat(held))
    held.load_state_dict(saved["state_dict"])
    assert torch.equal(begin.average, flat(held))
    module, _ = plain_fit([whole := EMA(0.9)])
    assert same_weights(resumed, module)
    # They begin with a copy of the weights after the first step, we with those before it.
    behind = plain_fit([first := EMA(0.9), Begin(first)], max_steps=1)
    left = 0.9**23 * (flat(behind[0]) - averaged(first, behind[0]))
    assert_accurate(averaged(ema, resumed) - left, averaged(whole, module).double())


def test_it_can_be_pickled_before_and_after_training() -> None:
    ema = EMA(0.9, export=True)
    assert pickle.loads(pickle.dumps(ema)).decay == 0.9
    module, _ = fit([ema], module=Classifier(schedulers=None))
    copied = pickle.loads(pickle.dumps(ema))
    assert torch.equal(averaged(copied, module), averaged(ema, module))


class CheckInProcess(Callback):
    """Fails the fit, in whichever process, unless the average has followed."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.world_size == 2
        assert self.ema.updates == trainer.global_step == 3
        assert not torch.equal(averaged(self.ema, pl_module), flat(pl_module))


@pytest.mark.slow
def test_it_survives_spawned_processes(tmp_path: Path) -> None:
    ema = EMA(0.9, export=True)
    run = trainer([ema, CheckInProcess(ema)], strategy="ddp_spawn", devices=2, max_steps=3)
    module = Classifier()
    begin = flat(module)
    run.fit(module, loader(), one_batch())
    assert not torch.equal(flat(module), begin)


def test_the_command_line_can_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])
    cli = LightningCLI(
        Classifier,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        args=[
            "--trainer.callbacks+=lightning_ext.callbacks.EMA",
            "--trainer.callbacks.decay=0.5",
            "--trainer.callbacks.reference_batch=64",
            "--trainer.callbacks.export=true",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
        ],
    )
    (ema,) = [c for c in vars(cli.trainer)["callbacks"] if isinstance(c, EMA)]
    assert (ema.decay, ema.reference_batch, ema.export_average) == (0.5, 64, True)
