"""DeepSpeed's folders and whole files: resume, other worlds, other strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, identical, loader, run_distributed, trainer
from harness.deepspeed_parts import (
    KNOWN_WARNINGS,
    AtEnd,
    Weights,
    deepspeed,
    furthest,
    trained,
    warm_up,
    weights_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.optim import SampleCosine
from lightning_ext.strategies._deepspeed._weights import load_weights

pytestmark = [
    *KNOWN_WARNINGS,
    pytest.mark.usefixtures("_warm"),
    # Each rank validates its own part.
    pytest.mark.filterwarnings(
        "ignore:Using `DistributedSampler` with the dataloaders:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"
    ),
]


@pytest.fixture(scope="module")
def _warm() -> None:
    warm_up()


class Normed(Classifier):
    """With buffers; other weights than `Classifier` where `seed` says so."""

    def __init__(self, seed: int | None = None, norm: bool = True) -> None:
        def decay(own: Any) -> dict[str, Any]:
            return {
                "scheduler": SampleCosine(own, total_samples=192, samples_per_step=8),
                "interval": "step",
            }

        super().__init__("adamw", dropout=0.0, schedulers=decay)
        self.net[2] = nn.BatchNorm1d(12) if norm else nn.Identity()
        if seed is not None:
            torch.manual_seed(seed)
            for parameter in self.parameters():
                nn.init.normal_(parameter)


def run(folder: str, ckpt_path: str | None, strategy: Any = "deepspeed") -> tuple[Weights, int]:
    """Two epochs in which the batch doubles; a checkpoint every third step."""
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    weights, fitted = trained(
        strategy,
        2,
        callbacks=[saver, AdaptiveBatchSize("0:8 40:16", max_micro_batch=4)],
        module=Normed(None if ckpt_path is None else 1, norm=False),
        accumulate_grad_batches=1,
        max_epochs=2,
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
    )
    return weights, fitted.global_step


def uninterrupted_and_resumed(folder: str) -> Any:
    whole = run(folder, None)
    return whole, [run(folder, f"{folder}/step={step}.ckpt") for step in (3, 6, 12)]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    for whole, again in run_distributed(uninterrupted_and_resumed, args=(str(tmp_path),)):
        assert whole[1] == 15
        for found in again:
            assert identical(found, whole)


def written(folder: str) -> Weights:
    """A run whose end is in `folder/parts`, and whole in `folder/whole.ckpt`."""

    def write(fitted: Any, module: Any) -> None:
        fitted.save_checkpoint(f"{folder}/parts")
        fitted.strategy.export(f"{folder}/whole.ckpt")

    return trained("deepspeed", 2, callbacks=[AtEnd(write)], module=Normed())[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, _warm: None) -> tuple[str, Weights]:
    folder = str(tmp_path_factory.mktemp("files"))
    return folder, run_distributed(written, args=(folder,))[0]


def validated(strategy: Any, world: int, module: Any, path: str | None = None) -> float:
    """The mean loss over ranks."""
    checker = trainer(strategy=strategy, devices=world)
    (found,) = checker.validate(module, loader(shuffle=False), ckpt_path=path, verbose=False)
    return float(checker.strategy.reduce(torch.tensor(found["val_loss"]), reduce_op="mean"))


def validated_by_deepspeed(folder: str, world: int) -> list[float]:
    """Of other weights, with the folder and with the file."""
    paths = (f"{folder}/parts", f"{folder}/whole.ckpt")
    return [validated(deepspeed(), world, Normed(seed=1), path) for path in paths]


def test_an_exported_file_is_a_module_for_anybody(files: tuple[str, Weights]) -> None:
    folder, weights = files
    module = Normed.load_from_checkpoint(f"{folder}/whole.ckpt", map_location="cpu")
    assert identical(dict(module.state_dict()), weights)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_world_evaluates_a_folder_and_a_file(files: tuple[str, Weights], world: int) -> None:
    folder, _ = files
    module = Normed.load_from_checkpoint(f"{folder}/whole.ckpt", map_location="cpu")
    expected = validated("auto", 1, module)
    for found in run_distributed(validated_by_deepspeed, world, args=(folder, world)):
        assert found == pytest.approx([expected, expected], rel=1e-6)


def fitted_from(path: str, world: int) -> Weights:
    return trained("deepspeed", world, module=Normed(seed=1), ckpt_path=path, max_epochs=2)[0]


def test_another_world_cannot_train_on_from_a_folder(files: tuple[str, Weights]) -> None:
    text = "was written by 2 ranks and there are 1: DeepSpeed does not move optimizer states"
    with pytest.raises(MisconfigurationException, match=text):
        run_distributed(fitted_from, 1, args=(f"{files[0]}/parts", 1))


def to_deepspeed_and_back(folder: str) -> Any:
    """DDP all the way, and with its second half by DeepSpeed, from DDP's file."""
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=6)
    options = {"max_epochs": 2, "enable_checkpointing": True}
    first = Classifier("unit", dropout=0.0)
    expected, _ = trained("ddp", 2, callbacks=[saver], module=first, **options)
    other = Classifier("unit", dropout=0.0)
    nn.init.normal_(other.net[0].weight)
    options |= {"ckpt_path": f"{folder}/step=6.ckpt", "enable_checkpointing": False}
    found, fitted = trained("deepspeed", 2, module=other, **options)
    return (
        furthest(found, expected),
        fitted.global_step,
        identical(found, weights_of(other, fitted)),
    )


@pytest.mark.filterwarnings("ignore:A single checkpoint file has been given:UserWarning")
def test_a_file_of_ddp_goes_on_under_deepspeed(tmp_path: Path) -> None:
    for apart, steps, same in run_distributed(to_deepspeed_and_back, args=(str(tmp_path),)):
        assert apart <= 1e-6
        assert steps == 12
        assert same


def wrong_file(folder: str) -> None:
    weights = {"state_dict": {"net.0.weight": torch.ones(5, 6), "more": torch.ones(1)}}
    path = f"{folder}/wrong.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.6", **weights}, path)
    validated(deepspeed(), 1, Classifier(), path)


def test_a_file_of_another_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not fit Classifier") as caught:
        run_distributed(wrong_file, 1, args=(str(tmp_path),))
    for part in ("size mismatch for net.0.weight", "missing", "net.3.bias", "unexpected ['more']"):
        assert part in str(caught.value)


def in_bfloat16(folder: str) -> Any:
    """The float32 weights behind, what a file holds of them, and what comes back from it."""
    path = f"{folder}/whole.ckpt"
    write = AtEnd(lambda fitted, module: fitted.strategy.export(path))
    options = {"precision": "bf16-mixed", "max_epochs": 1}
    weights, _ = trained("deepspeed", 2, callbacks=[write], module=classifier(0), **options)
    saved = torch.load(path, weights_only=True)["state_dict"]
    again = deepspeed()
    check = trainer(strategy=again, devices=2, precision="bf16-mixed", max_epochs=1)
    found: Weights = {}

    class Load(Classifier):
        def on_fit_start(self) -> None:
            load_weights(self, saved, strict=True)
            found.update(weights_of(self, check))

    module = Load(dropout=0.0)
    check.fit(module, loader(shuffle=False))
    return identical(saved, weights), identical(found, saved), saved


def classifier(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier("adamw", dropout=0.0)


def test_half_precision_exports_and_takes_back_float32_weights(tmp_path: Path) -> None:
    for exported, taken_back, weights in run_distributed(in_bfloat16, args=(str(tmp_path),)):
        assert exported
        assert taken_back
        assert any(not torch.equal(x, x.bfloat16().float()) for x in weights.values())


def fit_twice_and_validate() -> Any:
    """One module: fit, validate, fit with another accumulation, save."""
    module = Classifier("unit", dropout=0.0)
    run = trainer(strategy=deepspeed(), devices=2, accumulate_grad_batches=3, max_epochs=1)
    run.fit(module, loader(shuffle=False), loader(shuffle=False))
    before = run.callback_metrics["val_loss"].item()
    again = run.validate(module, loader(shuffle=False), verbose=False)[0]["val_loss"]
    run.accumulate_grad_batches, run.fit_loop.max_epochs = 2, 2
    run.fit(module, loader(shuffle=False))
    return before, again, run.global_step


def test_one_module_can_be_fitted_and_validated_again() -> None:
    for before, again, steps in run_distributed(fit_twice_and_validate):
        assert again == before
        assert steps == 4 + 6


class Configured(Classifier):
    """Makes its layers in parts, once."""

    def configure_model(self) -> None:
        if len(self.net) == 4:
            torch.manual_seed(2)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def made_in_parts() -> Any:
    module = Configured("unit")
    expected, _ = trained("ddp", 2, module=Configured("unit"))
    found, _ = trained(deepspeed(hpz_partition_size=2), 2, module=module)
    checker = deepspeed(hpz_partition_size=2)
    loss = validated(checker, 2, module)
    try:
        trained(deepspeed(hpz_partition_size=None), 2, module=Configured("unit"))
    except MisconfigurationException as error:
        return furthest(found, expected), loss, str(error)
    return None


def test_modules_made_in_parts_train_and_one_process_keeps_its_partition() -> None:
    ranks = run_distributed(made_in_parts)
    for apart, loss, text in ranks:
        assert apart <= 1e-6
        assert loss == ranks[0][1]
        assert "secondary partition is of 1 ranks, and an earlier run" in text


def folder_of_fsdp2(folder: str) -> None:
    Path(folder, "meta.pt").touch()
    validated(deepspeed(), 1, Classifier(), folder)


def test_a_folder_of_fsdp2_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"is a folder of 'fsdp2'.*export\(path\)"):
        run_distributed(folder_of_fsdp2, 1, args=(str(tmp_path),))
