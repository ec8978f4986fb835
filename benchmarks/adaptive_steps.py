"""How many optimizer steps does an adaptive batch save on the language model, at equal loss?

    PYTHONPATH=. python benchmarks/adaptive_steps.py           # a finished run is kept
    PYTHONPATH=. python benchmarks/adaptive_steps.py --report

Every run takes the same samples from the same weights and order of its seed: at the small batch,
or with the batch that AdAdaGrad's norm test asks for (debiased, averaged over steps). `--report`
writes `benchmarks/results/adaptive_steps.csv`: final validation losses against the band of the
small batch, mean ± 2 standard deviations over seeds, and the steps taken.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from examples.language_model.data import TextFolder
from examples.language_model.module import GPT
from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.scaling import BatchRule, BatchSizeSchedule, NormTest

ROOT = Path(__file__).parent.parent
MICRO_BATCH, ACCUMULATE, LARGEST = 2, 2, 64
SMALL = MICRO_BATCH * ACCUMULATE
LR, ETA, SAMPLES = 5e-4, 1.2, 8_192
SEEDS = {"small": range(5), "norm_test": range(3)}


class Order(Callback):
    """Collects the samples that were trained on."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Tensor, index: int) -> None:
        """Notes the windows of a batch."""
        self.seen += rows_of(batch)


def rows_of(batch: Tensor) -> list[bytes]:
    """Each window by its content."""
    return [bytes(row.tolist()) for row in batch]


def rule(name: str) -> BatchRule:
    """What sets the batch in a run."""
    return BatchSizeSchedule((0,), (SMALL,)) if name == "small" else NormTest(eta=ETA)


def train(name: str, seed: int, samples: int) -> dict[str, Any]:
    """Trains once and returns a row."""
    seed_everything(seed, verbose=False)
    data, order = TextFolder(micro_batch=MICRO_BATCH), Order()
    batch = AdaptiveBatchSize(
        rule(name), max_global_batch=LARGEST, max_micro_batch=32, max_samples=samples
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[batch, GradientNoiseScale(), order],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module = GPT(lr=LR)
    trainer.fit(module, data.train_dataloader())
    with torch.no_grad():
        parts = [module.loss(part).item() for part in data.validation.rows.split(64)]
    return {
        "run": name,
        "seed": seed,
        "samples": batch.samples_seen,
        "trained_on": len(order.seen),
        "repeated": sum((Counter(order.seen) - Counter(rows_of(data.train.rows))).values()),
        "steps": trainer.global_step,
        "final_batch": batch.global_batch,
        "val_loss": float(np.mean(parts)),
    }


def report(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each kind of run."""
    found = list(rows)
    small = np.array([r["val_loss"] for r in found if r["run"] == "small"])
    low, high = (float(small.mean() + side * 2 * small.std(ddof=1)) for side in (-1, 1))
    steps = float(np.mean([r["steps"] for r in found if r["run"] == "small"]))
    lines = []
    for name in SEEDS:
        chosen = [r for r in found if r["run"] == name]
        losses = [r["val_loss"] for r in chosen]
        taken = float(np.mean([r["steps"] for r in chosen]))
        lines.append(
            {
                "run": name,
                "seeds": len(chosen),
                "samples": int(np.mean([r["samples"] for r in chosen])),
                "steps": round(taken, 1),
                "steps_over_small": round(taken / steps, 3),
                "val_loss": round(float(np.mean(losses)), 4),
                "worst": round(max(losses), 4),
                "band": f"{low:.4f} to {high:.4f}",
                "mean_inside": bool(np.mean(losses) <= high),
                "seeds_inside": sum(loss <= high for loss in losses),
                "final_batch": float(np.mean([r["final_batch"] for r in chosen])),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
            }
        )
    return lines


def main() -> None:
    """Train what is missing, or report."""
    parser = argparse.ArgumentParser(description="Steps saved by an adaptive batch.")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive_steps"))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        lines = report(json.loads(file.read_text()) for file in sorted(args.out.glob("*.json")))
        with (ROOT / "benchmarks" / "results" / "adaptive_steps.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        for line in lines:
            print(line)
        return
    for seed in range(5):
        for name, seeds in SEEDS.items():
            path = args.out / f"{name}-{seed}.json"
            if seed in seeds and not path.exists():
                path.write_text(json.dumps(train(name, seed, args.samples)))
                print(path.read_text(), flush=True)


if __name__ == "__main__":
    main()
