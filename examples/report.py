"""Table and figure of a run, and how they get to W&B."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich
from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib.figure import Figure
from rich.table import Column, Table

FORMS = {"seconds": ".1f", "accuracy": ".2%"}


def show(name: str, row: Mapping[str, Any]) -> None:
    """Prints what a run came to, with what it measured of the averaged weights beside."""
    columns = "", name, "with EMA"
    table = Table(*(Column(c, justify="right" if k else "left") for k, c in enumerate(columns)))
    for key in (key for key in row if not key.endswith(", EMA")):
        averaged = row.get(f"{key}, EMA")
        beside = "" if averaged is None else written(key, averaged)
        table.add_row(key, written(key, row[key]), beside)
    rich.print(table)


def written(key: str, value: Any) -> str:
    """A value of the table as text."""
    return format(value, FORMS.get(key, "," if isinstance(value, int) else ".3f"))


def draw_run(metrics: Path, path: Path) -> Path | None:
    """Draws batch, noise scale, learning rate and loss of a run against samples.

    Returns:
        The figure, or ``None`` where the run was too short to log a step.
    """
    if not metrics.exists():
        return None
    rows = np.atleast_1d(np.genfromtxt(metrics, delimiter=",", names=True))
    if "samples_seen" not in rows.dtype.names:
        return None
    rows = rows[np.isfinite(rows["samples_seen"])]
    seen = rows["samples_seen"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    batch, noise, lr, loss = figure.subplots(2, 2).flat
    batch.step(seen, rows["global_batch"], where="post")
    lr.step(seen, rows["lr_scaled"], where="post")
    loss.plot(seen, rows["loss"])
    for name in (n for n in rows.dtype.names if n.endswith("noise_scale")):
        _band(noise, seen, rows, name)
    titles = "global batch", "noise scale", "learning rate", "training loss"
    for axes, title in zip((batch, noise, lr, loss), titles, strict=True):
        axes.set(title=title, xlabel="samples", yscale="linear" if axes is loss else "log")
    figure.savefig(path, dpi=100)
    return path


def _band(axes: Any, seen: Any, rows: Any, name: str) -> None:
    value = np.where(rows[name] > 0, rows[name], np.nan)
    (line,) = axes.plot(seen, value, label=name)
    low, high = np.fmax(rows[f"{name}_low"], 1), np.fmin(rows[f"{name}_high"], 1e5)
    axes.fill_between(seen, low, high, color=line.get_color(), alpha=0.2)
    if (shown := value[np.isfinite(value)]).size:  # intervals may have no end
        bottom, top = axes.get_ylim() if len(axes.lines) > 1 else (np.inf, 0)
        axes.set_ylim(min(bottom, shown.min() / 4), max(top, shown.max() * 4))
    axes.legend()


def publish(loggers: Iterable[Logger], row: Mapping[str, Any], figures: Iterable[Path]) -> None:
    """Puts the row into the summary and a table of each W&B run, with the figures, and ends it."""
    for logger in (x for x in loggers if isinstance(x, WandbLogger)):
        logger.experiment.summary.update(dict(row))
        logger.log_table("run", columns=list(row), data=[list(row.values())])
        for figure in figures:
            logger.log_image(figure.stem, [str(figure)])
        logger.experiment.finish()
