r"""Loss of the small GPT under ZeRO++ beside the seed band of plain FSDP2.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone \
        --nproc-per-node 4 benchmarks/zeropp_loss.py

Four ranks are two nodes of two. Every run takes the same number of steps; seeds change weights and
order of data. The band is what plain FSDP2 reaches over its seeds; a variant is inside of it where
its mean over seeds is.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks._rows import ROOT, describe, name_of, write
from examples.language_model.data import TextFolder
from examples.language_model.module import GPT
from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy

NODE = 2
MICRO_BATCH = 8
LAST = 50  # steps that a training loss is the mean of
OFF: dict[str, Any] = {"quantize_weights": False, "hpz": False, "quantize_gradients": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "zeropp": {},
    "zeropp, error feedback": {"error_feedback": True, "error_format": "float32"},
    "zeropp, error feedback in int8": {"error_feedback": True, "error_format": "int8"},
    "zeropp, blocks of 64": {"block_size": 64},
    "zeropp, error feedback, blocks of 64": {"error_feedback": True, "block_size": 64},
    "zeropp, plain error feedback": {"error_feedback": True, "error_beta": 0.0},
    "zeropp, int8 gradients": {"gradient_format": "int8"},
    "qwZ alone": {**OFF, "quantize_weights": True},
    "qgZ alone": {**OFF, "quantize_gradients": True},
}
SEEDS = {
    "fsdp2": 5,
    "zeropp": 3,
    "zeropp, error feedback": 3,
    "zeropp, error feedback, blocks of 64": 3,
}
DRAWN = ("zeropp", "zeropp, error feedback", "zeropp, error feedback, blocks of 64")


class Losses(Callback):
    """The loss of every step, the mean over ranks."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reduces and keeps it."""
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss)
        self.values.append(loss.item() / dist.get_world_size())


def run(variant: str, seed: int, steps: int) -> tuple[list[float], float]:
    """Losses of the steps, and of the validation windows at the end."""
    seed_everything(seed, verbose=False)
    data, losses = TextFolder(micro_batch=MICRO_BATCH), Losses()
    made = VARIANTS[variant]
    strategy = ZeroPPStrategy(ranks_per_node=NODE, **made) if made or variant != "fsdp2" else None
    trainer = Trainer(
        accelerator="cpu",
        devices=dist_size(),
        strategy=strategy or FSDP2Strategy(),
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = GPT()
    trainer.fit(module, datamodule=data)
    with torch.no_grad():
        parts = [(len(x), module.loss(x).item()) for x in data.val_dataloader()]
    return losses.values, sum(n * x for n, x in parts) / sum(n for n, _ in parts)


def dist_size() -> int:
    """Ranks, as torchrun says."""
    return int(os.environ["WORLD_SIZE"])


def row(variant: str, seed: int, steps: int, train: list[float], val: float) -> dict[str, str]:
    """A row of results."""
    return {
        "thing": "loss of a small GPT",
        "variant": variant,
        "mode": f"seed {seed}",
        "dtype": "float32",
        "shape": f"{steps} steps of {MICRO_BATCH * dist_size()} windows, 2 nodes x {NODE} ranks",
        "device": name_of("cpu"),
        "train_loss": f"{sum(train[-LAST:]) / LAST:.4f}",
        "val_loss": f"{val:.4f}",
        **describe("torch", "lightning"),
    }


def keep_curve(path: Path, variant: str, seed: int, train: list[float]) -> None:
    """Appends means over tens of steps."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["variant", "seed", "step", "loss"])
        for start in range(0, len(train), 10):
            part = train[start : start + 10]
            writer.writerow([variant, seed, start + len(part), f"{sum(part) / len(part):.4f}"])


def draw(curves: Path, figure: Path) -> None:
    """Draws means over seeds, above that of plain FSDP2, whose seeds make the band."""
    import numpy as np
    from matplotlib.figure import Figure

    found: dict[str, dict[str, list[float]]] = {}
    with curves.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            runs = found.setdefault(line["variant"], {})
            runs.setdefault(line["seed"], []).append(float(line["loss"]))
    smooth = np.ones(5) / 5  # each is the mean of 10 steps already
    smoothed = {
        variant: np.stack([np.convolve(run, smooth, "valid") for run in runs.values()])
        for variant, runs in found.items()
    }
    plain = smoothed["fsdp2"]
    steps, middle = 50 + 10 * np.arange(plain.shape[1]), plain.mean(0)
    canvas = Figure(figsize=(7, 4), layout="constrained")
    axes = canvas.add_subplot()
    low, high = plain.min(0) - middle, plain.max(0) - middle
    axes.fill_between(steps, low, high, color="C0", alpha=0.2, label="fsdp2, five seeds")
    for color, variant in enumerate(DRAWN, start=1):
        gap = smoothed[variant].mean(0) - middle[: smoothed[variant].shape[1]]
        axes.plot(steps, gap, color=f"C{color}", label=f"{variant}, three seeds")
    axes.axhline(0, color="C0", linewidth=1)
    axes.set(xlabel="steps", ylabel="training loss above the mean of fsdp2, nats")
    axes.set_title("GPT of 0.5 M parameters, 2 nodes of 2 ranks, measured")
    axes.legend(fontsize="small")
    canvas.savefig(figure, dpi=110)


def main() -> None:
    """Runs all variants and seeds, and writes rows and curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning on torch 2.13
    torch.set_num_threads(1)
    for number in range(max(SEEDS.values())):
        for variant in (v for v in args.only if number < SEEDS.get(v, 1)):
            train, val = run(variant, number, args.steps)
            if dist.get_rank() == 0:
                print(variant, number, f"{sum(train[-LAST:]) / LAST:.4f} {val:.4f}", flush=True)
                write([row(variant, number, args.steps, train, val)], args.out / "zeropp_loss.csv")
                keep_curve(args.out / "zeropp_loss_curves.csv", variant, number, train)
    if dist.get_rank() == 0:
        draw(args.out / "zeropp_loss_curves.csv", ROOT / "docs" / "zeropp_loss.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
