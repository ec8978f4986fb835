"""Train a small GPT on the bytes of source code, or of any text, while a rule sets the batch."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.language_model.data import TextFolder
from examples.language_model.module import GPT, REFERENCE_BATCH
from examples.quickstart import SamplesBar
from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.scaling import half_life_to_decay

ACCUMULATE = 2  # the noise scale is measured between the micro-batches of a step
HALF_LIFE_SAMPLES = 1000
PIPELINES = (
    "breadth_first_pipeline",
    "gpipe",
    "pipeline_1f1b",
    "pipeline_interleaved_1f1b",
)
COLUMNS = {"steps": ",", "samples": ",", "seconds": ".0f"}
COLUMNS |= {"validation loss": ".3f", "with EMA": ".3f", "final batch": ""}


def train(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], Path]:
    """Returns the row of the table and the file of the curves."""
    seed_everything(args.seed, verbose=False)
    micro_batch = args.batch // (ACCUMULATE * replicas(args))
    data = TextFolder(args.data, micro_batch=micro_batch)
    batch = AdaptiveBatchSize(
        args.rule,
        lr_rule=args.lr_rule,
        max_global_batch=None if ":" in args.rule else 32 * args.batch,
        max_micro_batch=max(64 // args.devices, micro_batch),
        max_samples=args.samples,
        reference_batch=REFERENCE_BATCH,
    )
    decay = half_life_to_decay(half_life_samples=HALF_LIFE_SAMPLES, global_batch=REFERENCE_BATCH)
    ema, noise, csv = (
        EMA(decay),
        GradientNoiseScale(1, geometry="euclidean"),
        CSVLogger(args.out, name=args.optimizer),
    )
    trainer = Trainer(
        accelerator="cpu",
        strategy=args.strategy,
        devices=args.devices,
        max_epochs=-1,  # AdaptiveBatchSize stops at max_samples
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[noise, batch, ema, SamplesBar(progress, args.optimizer, batch)],
        logger=[csv, *wandb_loggers(args)],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, start = GPT(optimizer=args.optimizer, lr=args.lr), time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    for logger in (x for x in trainer.loggers if isinstance(x, WandbLogger)):
        logger.experiment.finish()
    losses = [validation_loss(model, data)]
    with ema.swap(model):
        losses.append(validation_loss(model, data))
    row = trainer.global_step, batch.samples_seen, seconds, *losses, batch.global_batch
    return dict(zip(COLUMNS, row, strict=True)), Path(csv.log_dir) / "metrics.csv"


def replicas(args: argparse.Namespace) -> int:
    """Processes that see different data: those of a pipeline see the same."""
    return 1 if args.strategy in PIPELINES else args.devices


@torch.no_grad()
def validation_loss(model: GPT, data: TextFolder) -> float:
    """Nats per byte over the validation windows."""
    parts = [(len(part), model.loss(part).item()) for part in data.val_dataloader()]
    return sum(size * loss for size, loss in parts) / sum(size for size, _ in parts)


def wandb_loggers(args: argparse.Namespace) -> list[Logger]:
    """A W&B run where wandb is installed; it never asks for an account."""
    if args.wandb == "off" or find_spec("wandb") is None or rank_zero_only.rank != 0:
        return []
    import wandb

    args.out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="lightning_ext-language_model",
        name=f"{args.optimizer}-{args.rule}",
        dir=args.out,
        mode=args.wandb,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return [WandbLogger(experiment=run)]


def main() -> None:
    """Train once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", default="noise_scale", help="or norm_test, or a schedule")
    parser.add_argument("--lr-rule", default="auto", help="how hyper-parameters follow the batch")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--lr", type=float, help=f"at {REFERENCE_BATCH} windows a step")
    parser.add_argument("--batch", type=int, default=16, help="to begin with; even")
    parser.add_argument("--samples", type=int, default=16_000, help="windows to train on")
    parser.add_argument("--strategy", default="auto", help="fsdp2, breadth_first_pipeline, ddp, …")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="a folder of text, not the standard library")
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="folder")
    parser.add_argument("--wandb", choices=("offline", "online", "off"), default="offline")
    args = parser.parse_args()
    if args.batch < 1 or args.batch % (parts := ACCUMULATE * replicas(args)):
        parser.error(f"--batch {args.batch}: take a multiple of {parts}, two micro-batches a step")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning on torch 2.13
    torch.set_num_threads(1)  # more would only wait for each other: the model is small
    seen = TextColumn("{task.completed:>6,} samples · batch {task.fields[batch]}")
    columns = TextColumn("{task.description:>8}"), BarColumn(), seen
    with Progress(*columns, disable=rank_zero_only.rank != 0) as progress:
        row, metrics = train(args, progress)
    if rank_zero_only.rank != 0:  # of several processes
        return
    table = Table("run", *(Column(name, justify="right") for name in COLUMNS))
    table.add_row(args.optimizer, *(format(row[key], form) for key, form in COLUMNS.items()))
    rich.print(table)
    print(f"curves: {metrics}")


if __name__ == "__main__":
    main()
