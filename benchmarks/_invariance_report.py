"""Compares the runs of `benchmarks/invariance.py` with the band of the constant ones."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

Array = NDArray[np.float64]
Group = dict[int, Array]  # by seed: positions × (samples, raw, ema)
Key = tuple[str, str, int, str]  # task, optimizer, factor, rule
Groups = dict[Key, Group]
VERSIONS = "commit", "torch", "lightning", "date"
WEIGHTS = {"raw": 1, "ema": 2}  # and their column
RULES = ["sde", "linear_samples", "linear", "none", "constant"]  # as the figures colour them
WIDTH = 2.0  # of the band, in standard deviations to each side


def read(out: Path) -> tuple[Groups, dict[Key, dict[str, str]]]:
    """All finished runs, and what they ran with."""
    groups: Groups = {}
    versions: dict[Key, dict[str, str]] = {}
    for path in sorted(out.glob("*-*-*-*-*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        first = rows[0]
        key = first["task"], first["optimizer"], int(first["factor"]), first["rule"]
        columns = "samples", "val_loss", "ema_val_loss"
        curve = np.array([[float(row[name]) for name in columns] for row in rows])
        groups.setdefault(key, {})[int(first["seed"])] = curve
        versions[key] = {name: first[name] for name in VERSIONS}
    return groups, versions


def band(constant: Group) -> tuple[Array, Array]:
    """Mean and standard deviation over seeds at each position."""
    curves = np.stack(list(constant.values()))
    return curves.mean(0), curves.std(0, ddof=1)


def compare(group: Group, constant: Group, switch: int, column: int) -> dict[str, str]:
    """How far a switched group leaves the band, and the runs of its own seeds.

    `mean` is the largest deviation of the mean over seeds, in standard deviations of the constant
    runs, `paired` that of the mean difference between runs of one seed. The differences at the end
    are in nats, with their standard deviation.
    """
    mean, sd = (each[:, column] for each in band(constant))
    after = next(iter(group.values()))[:, 0] > switch
    curves = np.stack([curve[:, column] for curve in group.values()])
    paired = curves - np.stack([constant[seed][:, column] for seed in group])
    off = (curves - mean) / sd
    within = np.abs(off[:, after]).max(1) <= WIDTH
    deviation = _largest(off.mean(0)[after])
    return {
        "mean": f"{deviation:.2f}",
        "inside": "yes" if abs(deviation) <= WIDTH else "no",
        "seeds_inside": f"{within.sum()}/{len(within)}",
        "paired": f"{_largest((paired.mean(0) / sd)[after]):.2f}",
        "end": f"{paired[:, -1].mean():.4f}",
        "end_sd": f"{paired[:, -1].std(ddof=1) if len(paired) > 1 else np.nan:.4f}",
        "band_end": f"{mean[-1]:.4f}",
        "band_end_sd": f"{sd[-1]:.4f}",
    }


def summarize(groups: Groups, switches: dict[str, int]) -> Iterator[tuple[Key, dict[str, str]]]:
    """One row for each task, optimizer, factor and rule."""
    for key, group in groups.items():
        task, optimizer, factor, rule = key
        constant = groups.get((task, optimizer, 1, "constant"), {})
        if factor == 1 or len(constant) < 2 or not group.keys() <= constant.keys():
            continue
        row = {"task": task, "optimizer": optimizer, "factor": str(factor), "rule": rule}
        row |= {"seeds": str(len(group)), "constant_seeds": str(len(constant))}
        for weights, column in WEIGHTS.items():
            found = compare(group, constant, switches[task], column)
            row |= {f"{weights}_{name}": value for name, value in found.items()}
        yield key, row


def show(rows: list[dict[str, str]]) -> None:
    """Prints the columns that matter most."""
    shown = ["task", "optimizer", "factor", "rule"]
    shown += [f"{w}_{name}" for w in WEIGHTS for name in ("mean", "inside", "paired", "end")]
    table = Table(*shown)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    rich.print(table)


def draw(groups: Groups, task: str, switch: int, path: Path) -> None:
    """Validation loss against samples: optimizers from top to bottom, raw and averaged weights."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    known = {key[1] for key, group in groups.items() if key[0] == task and len(group) > 1}
    optimizers = sorted(known, reverse=True)
    grid = figure.subplots(len(optimizers), len(WEIGHTS), squeeze=False, sharex=True)
    for (row, optimizer), (place, weights) in itertools.product(
        enumerate(optimizers), enumerate(WEIGHTS)
    ):
        chosen = {key[2:]: group for key, group in groups.items() if key[:2] == (task, optimizer)}
        axes = grid[row, place]
        _panel(axes, chosen, switch, WEIGHTS[weights])
        axes.set(title=f"{optimizer}, {weights} weights", xlabel="samples", yscale="log")
        axes.set_ylabel("validation loss")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:.3g}")
    for axes in grid[:, -1]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def _panel(axes: Axes, chosen: dict[tuple[int, str], Group], switch: int, column: int) -> None:
    mean, sd = band(chosen[1, "constant"])
    after = mean[:, 0] >= switch
    samples, middle, width = mean[after, 0], mean[after, column], WIDTH * sd[after, column]
    label = "constant, mean ± 2 sd of seeds"
    axes.fill_between(samples, middle - width, middle + width, color="0.8", label=label)
    drawn = [middle]
    for factor, rule in sorted(chosen, key=lambda key: (RULES.index(key[1]), key[0])):
        if factor > 1:
            place = RULES.index(rule)
            form = f"C{place}" + ("-" if factor == 16 else "--")
            drawn.append(np.stack(list(chosen[factor, rule].values()))[:, after, column].mean(0))
            axes.plot(samples, drawn[-1], form, label=f"{rule}, × {factor}", zorder=9 - place)
    axes.set_ylim(np.nanmin(drawn) * 0.98, np.nanmax(drawn) * 1.02)


def _largest(values: Array) -> float:
    """The value farthest from 0, with its sign; nan where a run diverged."""
    if np.isnan(values).any():
        return float("nan")
    return float(values[np.abs(values).argmax()])
