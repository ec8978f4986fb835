"""A run that is resumed after any optimizer step equals the run that was never interrupted."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Classifier, fit, identical, loader, run_distributed, same_weights
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import RandomSampler

from lightning_ext.callbacks import EMA, AdaptiveBatchSize
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import SampleSchedule

pytestmark = pytest.mark.filterwarnings("ignore:The global batch may change, and with interval")


class Expectant(Classifier):
    """Asks how many steps there will be, and so has the loader set up before the restore."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def up_and_down() -> AdaptiveBatchSize:
    return AdaptiveBatchSize("0:8 30:16 70:32 150:8", max_micro_batch=8)


def by_noise() -> AdaptiveBatchSize:
    return AdaptiveBatchSize(
        "noise_scale",
        max_global_batch=64,
        max_micro_batch=16,
        dwell_samples=24,
        threshold=0.01,
        monotone=False,
    )


def on_plateau(optimizer: Any) -> Any:
    watched = ReduceLROnPlateau(optimizer, patience=0, threshold=1.0, factor=0.5)
    return {"scheduler": watched, "monitor": "val_loss"}


def cosine(optimizer: Any) -> Any:
    return {"scheduler": CosineAnnealingLR(optimizer, 30), "interval": "step"}


def by_samples(optimizer: Any) -> Any:
    schedule = SampleSchedule(optimizer, lambda seen: 1 / (1 + seen / 50), samples_per_step=8)
    return {"scheduler": schedule, "interval": "step"}


def with_generator() -> Any:
    return loader(50, generator=torch.Generator().manual_seed(7))


def seeded() -> Any:
    data = loader(50).dataset
    return loader(50, batch_sampler=AdaptiveBatchSampler(RandomSampler(data), 4, seed=3))


def end_state(run: Trainer) -> dict[str, Any]:
    """Everything that the next step would depend on."""
    states = {type(c).__name__: c.state_dict() for c in run.callbacks if c.state_dict()}
    states.pop("ModelCheckpoint", None)
    generators = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]
    return {
        "optimizer": run.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "callbacks": states,
        "average": [c._average._tensors for c in run.callbacks if isinstance(c, EMA)],
        "generators": generators,
        "steps": run.global_step,
        "logged_steps": run.fit_loop.epoch_loop._batches_that_stepped,
    }


CASES: dict[str, dict[str, Any]] = {
    "schedule": {},
    "noise scale": {"adaptive": by_noise},
    "no validation": {"val": False},
    "validation inside the epoch": {"trainer": {"val_check_interval": 0.5}},
    "validation every second epoch": {"trainer": {"check_val_every_n_epoch": 2}},
    "two workers": {"workers": 2, "trainer": {"max_epochs": 2}},
    "max_steps": {"trainer": {"max_epochs": -1, "max_steps": 14}},
    "max_steps, no validation": {"val": False, "trainer": {"max_epochs": -1, "max_steps": 14}},
    "epochs cut at a number": {"trainer": {"limit_train_batches": 7}},
    "epochs cut at a fraction": {"trainer": {"limit_train_batches": 0.6}},
    "plateau": {"schedulers": on_plateau},
    "plateau, validated inside the epoch": {
        "schedulers": on_plateau,
        "trainer": {"val_check_interval": 0.34},
    },
    "loader set up early": {"module": Expectant},
    "cosine": {"schedulers": cosine},
    "schedule by samples": {"schedulers": by_samples, "optimizer": "sgd"},
    "seeded sampler": {"train": seeded},
    "a generator of the user's": {"train": with_generator},
    "clipping": {"trainer": {"gradient_clip_val": 0.05}},
    "saved at the end of epochs": {"saved": {"save_on_train_epoch_end": True}},
    "saved at the end of epochs, max_steps": {
        "saved": {"save_on_train_epoch_end": True},
        "trainer": {"max_epochs": -1, "max_steps": 14},
    },
    "saved after validation": {"saved": {"save_on_train_epoch_end": False}},
}


def train(case: dict[str, Any], folder: Path, ckpt_path: str | None = None) -> tuple[Any, Trainer]:
    saves = case.get("saved", {"every_n_train_steps": 1})
    adaptive = case.get("adaptive", up_and_down)()
    make = case.get("module", Classifier)
    module = make(case.get("optimizer", "adamw"), schedulers=case.get("schedulers"))
    workers = case.get("workers", 0)
    return fit(
        [
            adaptive,
            EMA(0.9),
            ModelCheckpoint(folder, filename="{step}-{epoch}", save_top_k=-1, **saves),
        ],
        module=module,
        train=case.get("train", lambda: loader(50, num_workers=workers))(),
        val=loader(16, shuffle=False) if case.get("val", True) else None,
        ckpt_path=ckpt_path,
        **{"max_epochs": 3, "enable_checkpointing": True} | case.get("trainer", {}),
    )


@pytest.mark.parametrize("name", CASES)
def test_every_checkpoint_leads_to_the_same_end(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module, run = train(case, tmp_path)
    expected = end_state(run)
    written = sorted(tmp_path.glob("*.ckpt"))
    assert len(written) == (run.current_epoch if "saved" in case else run.global_step)
    for path in written:
        again, resumed = train(case, tmp_path, str(path))
        tail = len(again.seen)
        assert again.seen == module.seen[len(module.seen) - tail :], path.name
        assert again.losses == module.losses[len(module.losses) - tail :], path.name
        assert same_weights(module, again), path.name
        if tail:  # after the last step there is nothing left to draw, log or validate
            found = end_state(resumed)
            different = [key for key in expected if not identical(expected[key], found[key])]
            assert different == [], path.name


def killed_at(step: int | None, folder: str, name: str | None) -> Any:
    """Trains in a process of its own, which dies without a word after a step."""

    class Kill(Callback):
        def on_train_batch_end(self, run: Trainer, *args: Any) -> None:
            if run.global_step == step:
                os._exit(9)

    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, _ = fit(
        [by_noise(), EMA(0.9), saver, Kill()],
        train=loader(50),
        ckpt_path=None if name is None else f"{folder}/{name}",
        enable_checkpointing=True,
    )
    return module.seen, module.state_dict()


def test_a_killed_process_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    ((seen, weights),) = run_distributed(
        killed_at, world_size=1, args=(None, str(tmp_path / "whole"), None)
    )
    with pytest.raises(RuntimeError, match="exit code 9"):
        run_distributed(killed_at, world_size=1, args=(6, str(tmp_path / "killed"), None))
    last = sorted((tmp_path / "killed").glob("*.ckpt"))[-1]
    assert last.name == "step=5.ckpt"  # the step that killed it was not saved
    ((rest, again),) = run_distributed(
        killed_at, world_size=1, args=(None, str(tmp_path / "killed"), last.name)
    )
    assert rest == seen[len(seen) - len(rest) :]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
