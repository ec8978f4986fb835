"""Every recipe at every batch over the same samples: rows, a table and a figure.

``python -m examples.image_classification.study``; what it does not know goes to each run.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np
import rich
from matplotlib.figure import Figure
from rich.table import Column, Table

from examples.image_classification.main import main as train_main

HERE = Path(__file__).resolve().parent
RECIPES = {
    "sgd": "SGD, constant rate",
    "linear": "linear rule, warm-up",
    "clipping": "… and gradients clipped",
    "lars": "LARS, linear rule, warm-up",
    "adaptive": "adaptive batch",
}
OPTIMIZER, CLIPPING = "--model.optimizer.init_args", "--trainer.callbacks.init_args.clipping"
TRUST = f"{OPTIMIZER}.trust_coefficient"
# What --tune tries of each recipe at the largest batch; rates are those of the reference.
GRID: dict[str, list[dict[str, float]]] = {
    "sgd": [{f"{OPTIMIZER}.lr": lr} for lr in (0.1, 0.3)],
    "linear": [{f"{OPTIMIZER}.lr": lr} for lr in (0.01, 0.02, 0.03, 0.1)],
    "clipping": [
        {f"{OPTIMIZER}.lr": lr, CLIPPING: most}
        for lr, most in ((0.02, 0.04), (0.03, 0.02), (0.03, 0.04), (0.03, 0.08), (0.1, 0.01))
    ],
    "lars": [
        {f"{OPTIMIZER}.lr": lr, TRUST: trust}
        for lr, trust in ((0.01, 0.1), (0.02, 0.05), (0.02, 0.1), (0.1, 0.01), (0.1, 0.04))
    ],
}
TUNING_BATCH = 2048
TUNING_SEED = 10
Row = dict[str, Any]
Task = tuple[str, int, int, Path, list[str]]


def command(recipe: str, batch: int, seed: int, out: Path, more: Sequence[str]) -> list[str]:
    """The command line of one run."""
    if recipe == "adaptive":
        own = ["--trainer.log_every_n_steps=1"]
    else:  # nothing reads a noise scale
        own = [f"--batch.rule=0:{batch}", "--trainer.log_every_n_steps=8"]
        own += ["--data.micro_batch=64", "--trainer.accumulate_grad_batches=1"]
        own += ["--noise.every_n_steps=1000000"]
    return [
        "fit",
        f"--config={HERE / 'recipes' / recipe}.yaml",
        f"--seed_everything={seed}",
        f"--name={recipe}-{batch}-{seed}",
        f"--out={out}",
        "--group=study",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        *own,
        *more,
    ]


def train(task: Task) -> Row:
    """Makes one run and returns its row."""
    recipe, batch, seed, out, more = task
    with redirect_stdout(io.StringIO()):
        row = train_main(command(recipe, batch, seed, out, more)).row
    named = {key.replace(", ", " ").replace(" ", "_"): value for key, value in row.items()}
    return {"recipe": recipe, "batch": batch, "seed": seed, **named}


def run_all(tasks: list[Task], file: Path, jobs: int) -> list[Row]:
    """Makes the runs that the file has not, and adds their rows to it."""
    rows = read(file)
    known = {(row["recipe"], row["batch"], row["seed"]) for row in rows}
    left = [task for task in tasks if task[:3] not in known]
    file.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(jobs) if jobs > 1 else _InLine() as pool:
        for row in pool.imap_unordered(train, left):
            rows.append(row)
            write(file, rows)
            print(
                f"{row['recipe']:>9} {row['batch']:>5}, seed {row['seed']}:"
                f" {row['accuracy']:.2%}, with EMA {row['accuracy_EMA']:.2%}",
                flush=True,
            )
    wanted = {task[:3] for task in tasks}
    return [row for row in ordered(rows) if (row["recipe"], row["batch"], row["seed"]) in wanted]


class _InLine:
    """A pool that is this process."""

    imap_unordered = staticmethod(map)

    def __enter__(self) -> _InLine:
        return self

    def __exit__(self, *_: object) -> None: ...


def read(file: Path) -> list[Row]:
    """Rows of a file, none where there is no file."""
    if not file.exists():
        return []
    whole = {"batch", "seed", "steps", "samples", "final_batch"}
    with file.open(newline="") as opened:
        return [
            {k: v if k == "recipe" else int(v) if k in whole else float(v) for k, v in row.items()}
            for row in csv.DictReader(opened)
        ]


def write(file: Path, rows: list[Row]) -> None:
    """Writes rows in order."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in ordered(rows):
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def ordered(rows: list[Row]) -> list[Row]:
    """Rows in order of recipe, batch and seed."""
    order = list(RECIPES)
    return sorted(rows, key=lambda row: (order.index(row["recipe"]), row["batch"], row["seed"]))


def cells(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows of all seeds by recipe and batch."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["recipe"], row["batch"]), []).append(row)
    return found


def table(rows: list[Row]) -> list[list[str]]:
    """A line for each recipe and batch: means over seeds, with their standard deviation."""
    lines = []
    for (recipe, batch), same in cells(rows).items():
        scores = [[100 * row[key] for row in same] for key in ("accuracy", "accuracy_EMA")]
        loss = mean(row["validation_loss_EMA"] for row in same)
        steps, final = (mean(row[key] for row in same) for key in ("steps", "final_batch"))
        shown = f"{batch} to {final:.0f}" if recipe == "adaptive" else str(batch)
        percent = [f"{mean(some):.1f} ± {pstdev(some):.1f}" for some in scores]
        lines.append([RECIPES[recipe], shown, f"{steps:.0f}", *percent, f"{loss:.3f}"])
    return lines


def draw(rows: list[Row], curves: Path | None, path: Path) -> None:
    """Accuracy by batch for each recipe, and batch, noise scale and rate of an adaptive run."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    accuracy, batch, lr, loss = figure.subplots(2, 2).flat
    for recipe, label in RECIPES.items():
        of_it = {b: same for (name, b), same in cells(rows).items() if name == recipe}
        if recipe == "adaptive":  # where its mean step is
            of_it = {
                sum(r["samples"] for r in x) / sum(r["steps"] for r in x): x for x in of_it.values()
            }
        at = sorted(of_it)
        scores = [[row["accuracy_EMA"] for row in of_it[b]] for b in at]
        middle = np.array([mean(some) for some in scores])
        ends = np.abs([[min(some) for some in scores], [max(some) for some in scores]] - middle)
        accuracy.errorbar(at, middle, yerr=ends, label=label, marker="o", capsize=3)
    accuracy.set(title="accuracy with EMA, mean and range of seeds", xlabel="global batch")
    accuracy.set_xscale("log", base=2)
    accuracy.legend()
    if curves is not None:
        _draw_curves(curves, batch, lr, loss)
    figure.savefig(path, dpi=100)


def _draw_curves(curves: Path, batch: Any, lr: Any, loss: Any) -> None:
    rows = np.atleast_1d(np.genfromtxt(curves, delimiter=",", names=True))
    rows = rows[np.isfinite(rows["samples_seen"])]
    seen = rows["samples_seen"]
    batch.step(seen, rows["global_batch"], where="post", color="black", label="global batch")
    noise = np.where(rows["noise_scale"] > 0, rows["noise_scale"], np.nan)
    batch.plot(seen, noise, color="C4", label="noise scale")
    ends = np.fmax(rows["noise_scale_low"], 1), np.fmin(rows["noise_scale_high"], 1e5)
    batch.fill_between(seen, *ends, color="C4", alpha=0.2)
    batch.set_ylim(4, 4096)
    batch.legend()
    lr.step(seen, rows["lr_scaled"], where="post", color="black")
    loss.plot(seen, rows["loss"], color="black")
    loss.set_yscale("log")
    batch.set(title="adaptive run, seed 0", xlabel="samples", yscale="log")
    lr.set(title="its learning rate", xlabel="samples")
    loss.set(title="its training loss", xlabel="samples")


def newest(out: Path, name: str) -> Path | None:
    """Curves of the last run of that name."""
    found = (out / name).glob("version_*/metrics.csv")
    return max(found, key=lambda path: int(path.parent.name.partition("_")[2]), default=None)


def publish(out: Path, lines: list[list[str]], figure: Path, mode: str) -> None:
    """Table and figure as one W&B run of the group, where wandb is installed."""
    try:
        import wandb
    except ImportError:
        return
    if mode == "off":
        return
    settings = wandb.Settings(silent=mode == "offline", console="off")
    names: dict[str, Any] = {"project": "lightning_ext-image_classification", "name": "study"}
    run = wandb.init(**names, group="study", dir=out.resolve(), mode=mode, settings=settings)
    run.log({"study": wandb.Table(columns=COLUMNS, data=lines), "figure": wandb.Image(str(figure))})
    run.finish()


COLUMNS = ["recipe", "batch", "steps", "accuracy, %", "with EMA, %", "loss, EMA"]


def show(columns: list[str], lines: list[list[str]]) -> None:
    """Prints a table."""
    shown = Table(
        *(Column(name, justify="right" if k else "left") for k, name in enumerate(columns))
    )
    for line in lines:
        shown.add_row(*line)
    rich.print(shown)


def tune(args: argparse.Namespace, more: list[str]) -> None:
    """Each recipe's grid at the largest batch, on another seed."""
    for recipe in (name for name in args.recipes if name in GRID):
        for chosen in GRID[recipe]:
            own = [f"{key}={value:g}" for key, value in chosen.items()]
            task = (recipe, TUNING_BATCH, TUNING_SEED, args.out / "tuning", [*more, *own])
            row = train(task)
            print(f"{recipe} {' '.join(own)}: with EMA {row['accuracy_EMA']:.2%}", flush=True)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, … of each")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("runs/image_classification"))
    parser.add_argument("--wandb", choices=("offline", "online", "off"), default="offline")
    parser.add_argument("--tune", action="store_true", help="instead, the grids of --recipes")
    args, more = parser.parse_known_args(arguments)
    more = [f"--wandb={args.wandb}", *more]
    if args.tune:
        tune(args, more)
        return []
    tasks: list[Task] = [
        (recipe, batch, seed, args.out, more)
        for seed in range(args.seeds)
        for recipe in args.recipes
        for batch in ([64] if recipe == "adaptive" else args.batches)
    ]
    rows = run_all(tasks, args.out / "study.csv", args.jobs)
    figure, lines = args.out / "image_classification.png", table(rows)
    show(COLUMNS, lines)
    draw(rows, newest(args.out, "adaptive-64-0"), figure)
    publish(args.out, lines, figure, args.wandb)
    print(f"rows: {args.out / 'study.csv'}\nfigure: {figure}")
    return rows


if __name__ == "__main__":
    main()
