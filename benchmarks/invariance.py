"""Switch the batch in mid-run: does the loss against samples stay within the spread of seeds?

    python benchmarks/invariance.py --out runs/invariance    # each run once, a finished one is kept
    python benchmarks/invariance.py --out runs/invariance --report

A run trains at its reference batch, or switches to 8 or 16 times as much at a fixed number of
samples. A seed fixes weights and order of samples, so that runs of one seed differ in nothing but
the switch. `--report` compares the runs after the switch with the band of the constant ones, mean
± 2 standard deviations over seeds, and writes `benchmarks/results/invariance.csv` and one figure
for each task.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import _invariance_report as reporting
from benchmarks._invariance_tasks import TASKS, Task
from benchmarks._rows import describe
from lightning_ext.callbacks import EMA, AdaptiveBatchSize
from lightning_ext.scaling import half_life_to_decay

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "invariance.csv"
# The first rule of an optimizer is the right one.
RULES = {"sgd": ("linear_samples", "linear", "none"), "adamw": ("sde", "linear", "none")}
FACTORS = (8, 16)
MAX_MICRO_BATCH = 32
CONSTANT_SEEDS, SWITCHED_SEEDS = range(5), range(3)
COLUMNS = ("samples", "steps", "global_batch", "train_loss", "val_loss", "ema_val_loss")


class Run(NamedTuple):
    """One training run; a factor of 1 is the constant batch."""

    task: str
    optimizer: str
    factor: int
    rule: str
    seed: int


class Curve(Callback):
    """Writes down losses at fixed numbers of samples, and saves the run one step before a switch.

    What it has written is part of the checkpoint, so that a run goes on with the rows so far.
    """

    def __init__(
        self,
        batch: AdaptiveBatchSize,
        ema: EMA,
        task: Task,
        loss: Callable[[Any], Tensor],
        fork: tuple[int, Path] | None,
    ) -> None:
        self.batch, self.ema, self.task, self.loss, self.fork = batch, ema, task, loss, fork
        self.rows: list[tuple[float, ...]] = []
        self.losses: list[float] = []
        self.accumulate = 1

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Notes what the Trainer divides the loss by."""
        self.accumulate = trainer.accumulate_grad_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates after the first step at or past the next position."""
        self.losses.append(outputs["loss"].item() * self.accumulate)
        seen = self.batch.samples_seen
        if seen >= self.task.every * (len(self.rows) + 1):
            train, self.losses = float(np.mean(self.losses)), []
            size = self.batch.global_batch
            self.rows.append((seen, trainer.global_step, size, train, *self.evaluate(pl_module)))
        if self.fork is not None and seen == self.fork[0]:
            trainer.save_checkpoint(self.fork[1])

    @torch.no_grad()
    def evaluate(self, module: LightningModule) -> tuple[float, float]:
        """Validation loss of the weights and of their average."""
        raw = self.loss(module).item()
        with self.ema.swap(module):
            return raw, self.loss(module).item()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows, "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the rows of a checkpoint."""
        self.rows, self.losses = list(state_dict["rows"]), list(state_dict["losses"])


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """The study: the right rules first; a constant run comes before those that go on from it."""
    seeds = SWITCHED_SEEDS if args.seeds is None else args.seeds
    more = CONSTANT_SEEDS[len(SWITCHED_SEEDS) :] if args.seeds is None else ()
    for task, optimizer in itertools.product(args.task, args.optimizer):
        right, *wrong = RULES[optimizer]
        for seed in seeds:
            yield Run(task, optimizer, 1, "constant", seed)
            yield from (Run(task, optimizer, factor, right, seed) for factor in args.factor)
        yield from (Run(task, optimizer, 1, "constant", seed) for seed in more)
        for rule, seed, factor in itertools.product(wrong, seeds, args.factor):
            yield Run(task, optimizer, factor, rule, seed)


def train(run: Run, out: Path) -> list[tuple[float, ...]]:
    """Returns the run's rows; a switched run goes on from the constant one of its seed."""
    task = TASKS[run.task]
    reference = task.reference_batch[run.optimizer]
    seed_everything(run.seed, verbose=False)
    module = task.build(run.optimizer, task.lr[run.optimizer])
    loader, loss = task.load(reference)
    switched = run.factor > 1
    grown = f" {task.switch}:{reference * run.factor}" if switched else ""
    batch = AdaptiveBatchSize(
        f"0:{reference}{grown}",
        lr_rule=run.rule if switched else "none",
        max_micro_batch=MAX_MICRO_BATCH,
        max_samples=task.samples,
    )
    ema = EMA(half_life_to_decay(half_life_samples=task.half_life, global_batch=reference))
    fork = out / f"{run.task}-{run.optimizer}-{run.seed}.ckpt"
    save = None if switched else (task.switch - reference, fork)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[batch, ema, curve := Curve(batch, ema, task, loss, save)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=fork if switched else None, weights_only=True)
    return curve.rows


def study(args: argparse.Namespace) -> None:
    """Trains what has not been trained yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    for run in runs(args):
        path = args.out / ("-".join(map(str, run)) + ".csv")
        if path.exists():
            continue
        start = time.perf_counter()
        rows = train(run, args.out)
        part, known = path.with_suffix(".part"), describe()
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow((*Run._fields, *COLUMNS, *known))
            writer.writerows((*run, *row, *known.values()) for row in rows)
        part.rename(path)
        taken, last = time.perf_counter() - start, rows[-1]
        print(*run, f"val {last[4]:.4f} ema {last[5]:.4f} in {taken:.0f} s", flush=True)


def report(out: Path) -> None:
    """Writes the table and the figures of what is there."""
    groups, versions = reporting.read(out)
    found = reporting.summarize(groups, {name: task.switch for name, task in TASKS.items()})
    rows = [row | settings(*key[:2]) | versions[key] for key, row in found]
    reporting.show(rows)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for name in {row["task"]: None for row in rows}:
        path = ROOT / "docs" / f"invariance_{name}.png"
        reporting.draw(groups, name, TASKS[name].switch, path)


def settings(name: str, optimizer: str) -> dict[str, str]:
    """What a row's runs have in common."""
    task = TASKS[name]
    values = {"reference_batch": task.reference_batch[optimizer], "lr": task.lr[optimizer]}
    return {key: str(value) for key, value in values.items()} | {
        "samples": str(task.samples),
        "switch": str(task.switch),
    }


def main() -> None:
    """Run the study, or report on it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/invariance"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizer", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--factor", nargs="+", type=int, default=list(FACTORS))
    parser.add_argument("--seeds", nargs="+", type=int)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.report:
        report(args.out)
    else:
        study(args)


if __name__ == "__main__":
    main()
