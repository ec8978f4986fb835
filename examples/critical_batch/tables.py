"""The study's results as tables, on the screen and in a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import rich
from rich.table import Column, Table

from examples.critical_batch.measure import Point
from lightning_ext.scaling import (
    CRITICAL_BATCH_DEFINITIONS,
    CriticalBatchFit,
    StepsToTarget,
    knee_from_noise,
)

ROUNDS = 4  # times that the run is branched
COLUMNS = "what", "critical batch", "95 % interval", "at loss"
Line = tuple[str, str, str, str]


def lines(fit: CriticalBatchFit, points: Sequence[Point], knees: dict[str, float]) -> list[Line]:
    """Every critical batch, of the noise scales those of a few places."""
    found = [
        (e.definition, f"{e.value:.3g}", f"{e.low:.3g} to {e.high:.3g}", "") for e in fit.estimates
    ]
    found += [(f"knee foretold by {name}", f"{knee:.3g}", "", "") for name, knee in knees.items()]
    for point in shown(points):
        limits = f"{point.low:.3g} to {point.high:.3g}"
        if point.name == "branched":
            limits = f"worse at {point.high:g}"
        found.append((point.name, f"{point.value:.3g}", limits, f"{point.loss:.2f}"))
    return found


def report(fit: CriticalBatchFit, found: Iterable[Line]) -> None:
    """Prints the table, what its names mean, and what to beware of."""
    table = Table(*(Column(c, justify="right" if k else "left") for k, c in enumerate(COLUMNS)))
    for line in found:
        table.add_row(*line)
    rich.print(table)
    for name, meaning in CRITICAL_BATCH_DEFINITIONS.items():
        print(f"{name}: {meaning}")
    print(fit.statement)
    for estimate in fit.estimates:
        for note in estimate.notes:
            print(f"{estimate.definition}: {note}")
    for batch, reason in fit.untuned:
        print(f"batch {batch:g} looks untuned: {reason}")


def report_sweep(table: Sequence[StepsToTarget]) -> None:
    """Prints steps and samples of each batch at its best learning rate."""
    printed = Table("global batch", "steps", "samples")
    for entry in table:
        samples = entry.steps * entry.global_batch
        printed.add_row(*(f"{x:,.0f}" for x in (entry.global_batch, entry.steps, samples)))
    rich.print(printed)


def foretold(points: Iterable[Point], batch: int) -> dict[str, float]:
    """The knee that each geometry's noise scales foretell."""
    scales: dict[str, list[float]] = {}
    for point in points:
        # An estimate may be negative, or nan, where there is little signal.
        if point.name != "branched" and point.value >= 0:
            scales.setdefault(point.name, []).append(point.value)
    return {name: knee_from_noise(values, batch) for name, values in scales.items()}


def shown(points: Sequence[Point]) -> list[Point]:
    """Of each measure as many points as there are branchings, the last one among them."""
    kept = []
    for name in dict.fromkeys(point.name for point in points):
        own = [point for point in points if point.name == name]
        places = {round((len(own) - 1) * (k + 1) / ROUNDS) for k in range(ROUNDS)}
        kept += [point for k, point in enumerate(own) if name == "branched" or k in places]
    return kept


def save(points: Iterable[Point], path: Path) -> None:
    """Writes what the run measured."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        writer.writerows(points)
