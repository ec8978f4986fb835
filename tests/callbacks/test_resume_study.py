"""Runs of random settings, resumed from random steps: a longer study of bitwise resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from harness import Classifier, fit, identical, loader, same_weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_ext.callbacks import EMA, AdaptiveBatchSize
from lightning_ext.scaling import NoiseScaleRule

pytestmark = [
    pytest.mark.slow,
    # Random sizes do what these warn of.
    pytest.mark.filterwarnings("ignore:.*(cannot be made of|is more than the|next epoch only)"),
]


def on_plateau(optimizer: Any) -> Any:
    watched = ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
    return {"scheduler": watched, "monitor": "val_loss"}


def draw(rng: random.Random) -> dict[str, Any]:
    """Settings of one run."""
    micro_batch, accumulate = rng.randint(1, 6), rng.randint(1, 4)
    starts = [0, *sorted(rng.sample(range(1, 200), rng.randint(0, 4)))]
    sizes = [
        rng.choice([1, 2, 3, 5, 8]) * micro_batch * rng.choice([1, accumulate]) for _ in starts
    ]
    schedule = " ".join(f"{start}:{size}" for start, size in zip(starts, sizes, strict=True))
    by_noise = accumulate > 1 and rng.random() < 0.4
    options: dict[str, Any] = {
        "max_micro_batch": rng.choice([None, micro_batch, 2 * micro_batch, 3 * micro_batch])
    }
    if by_noise:
        limit = micro_batch * accumulate * 6
        options |= {"max_global_batch": limit, "dwell_samples": 0, "monotone": False}
    settings: dict[str, Any] = {
        "max_epochs": rng.randint(1, 4),
        "accumulate_grad_batches": accumulate,
        "limit_train_batches": rng.choice([1.0, 1.0, 3, 5, 0.5]),
    }
    validate = rng.random() < 0.6
    if validate:
        settings["val_check_interval"] = rng.choice([1.0, 0.5, 0.34])
    return {
        "rule": NoiseScaleRule(rng.choice([1.0, 20.0])) if by_noise else schedule,
        "options": options,
        "settings": settings,
        "validate": validate,
        "plateau": validate and rng.random() < 0.5,
        "optimizer": rng.choice(["sgd", "adamw"]),
        "data": {"num_samples": rng.randint(9, 70), "batch_size": micro_batch},
        "loader": {"drop_last": rng.random() < 0.3, "shuffle": rng.random() < 0.7},
    }


def train(drawn: dict[str, Any], folder: Path, ckpt_path: Path | None = None) -> Any:
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    plateau = on_plateau if drawn["plateau"] else None
    return fit(
        [AdaptiveBatchSize(drawn["rule"], **drawn["options"]), EMA(0.9), saver],
        module=Classifier(drawn["optimizer"], schedulers=plateau),
        train=loader(**drawn["data"], **drawn["loader"]),
        val=loader(6, 3, shuffle=False) if drawn["validate"] else None,
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
        **drawn["settings"],
    )


@pytest.mark.parametrize("seed", range(150))
def test_a_random_run_resumes_bitwise(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    drawn = draw(rng)
    try:
        module, run = train(drawn, tmp_path)
    except MisconfigurationException as error:  # too few batches for the fraction that was drawn
        if "You requested to check" not in str(error):
            raise
        return
    files = sorted(tmp_path.glob("*.ckpt"))
    for path in rng.sample(files, min(3, len(files))):
        again, resumed = train(drawn, tmp_path, path)
        assert again.seen == module.seen[len(module.seen) - len(again.seen) :], path.name
        assert same_weights(again, module), path.name
        states = [r.optimizers[0].state_dict() for r in (run, resumed)]
        assert identical(*states), path.name
