"""What the rows of pipelined backpropagation say over seeds: intervals, a table, the figure."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLORS = {
    "synchronous": "0.3",
    "late": "C3",
    "spike": "C0",
    "prediction": "C1",
    "both": "C2",
}
Interval = tuple[float, float, float]  # mean, and 95 % by Student's t over seeds


class Line(NamedTuple):
    """A variant on so many stages at a rate of the reference batch."""

    variant: str
    stages: int
    lr: float
    micro_batch: int
    loss: Interval  # geometric mean
    ratio: Interval  # loss over the synchronous one at its best rate, paired by seed
    accuracy: Interval


def interval(values: Any) -> Interval:
    """Mean and interval of one value for each seed."""
    from scipy.stats import t

    middle = float(np.mean(values))
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return middle, middle - half, middle + half


def exponential(values: Any) -> Interval:
    """The same of logarithms."""
    middle, low, high = np.exp(interval(values))
    return float(middle), float(low), float(high)


def summarize(path: Path) -> list[Line]:
    """A line for each variant, number of stages and rate."""
    found: dict[tuple[str, int, float, int], list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in sorted(csv.DictReader(file), key=lambda row: int(row["seed"])):
            key = row["variant"], int(row["stages"]), float(row["lr"]), int(row["micro_batch"])
            values = np.log(float(row["train_loss"])), float(row["test_accuracy"])
            found.setdefault(key, []).append(values)
    base: dict[int, Any] = {}
    for key, rows in found.items():
        loss = np.array(rows)[:, 0]
        if key[0] == "synchronous" and np.mean(loss) <= np.mean(base.get(key[3], np.inf)):
            base[key[3]] = loss
    lines = []
    for key, rows in sorted(found.items()):
        loss, accuracy = np.array(rows).T
        parts = exponential(loss), exponential(loss - base[key[3]]), interval(accuracy)
        lines.append(Line(*key, *parts))
    return lines


def best_of(lines: list[Line], variant: str, stages: int) -> Line:
    """The line of the rate that has the least training loss."""
    chosen = [x for x in lines if (x.variant, x.stages) == (variant, stages)]
    return min(chosen, key=lambda x: x.loss)


def print_table(lines: list[Line]) -> None:
    """Prints means and intervals."""
    for line in sorted(lines, key=lambda x: (x.micro_batch, x.stages, x.variant, x.lr)):
        loss, ratio, accuracy = (f"{m:.3f} ({low:.3f} to {high:.3f})" for m, low, high in line[4:])
        place = f"{line.micro_batch} {line.stages:2} {line.variant:12} {line.lr:5}"
        print(f"{place} | {loss} | {ratio} | {accuracy}")


def draw(lines: list[Line], figure: Path) -> None:
    """Draws the training loss against the number of stages, and on two stages against the rate."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = canvas.subplots(1, 2)
    whole = [x for x in lines if x.micro_batch > 1]
    middle, low, high = best_of(whole, "synchronous", 1).loss
    left.axhspan(low, high, color="0.88")
    left.axhline(middle, color="0.3", label="synchronous")
    depths = sorted({x.stages for x in whole} - {1})
    for index, (variant, color) in enumerate(COLORS.items()):
        nudge = 1 + 0.03 * (index - 2)
        single = [x for x in lines if (x.variant, x.micro_batch) == (variant, 1) and x.stages > 1]
        if variant != "synchronous":
            deep = [best_of(whole, variant, stages) for stages in depths]
            bars(left, [x.stages * nudge for x in deep], deep, color=color, label=variant)
            bars(left, [x.stages * nudge for x in single], single, color=color, mfc="white")
        shallow = [x for x in whole if x.variant == variant and x.stages <= 2]
        bars(right, [x.lr * nudge for x in shallow], shallow, color=color)
    left.set(xscale="log", yscale="log", xlabel="stages", ylabel="training loss at the end")
    left.set_xticks(depths, labels=[str(x) for x in depths])
    left.minorticks_off()
    left.set_title("each at its best rate; hollow: micro-batches of one", fontsize="medium")
    left.legend(fontsize="small")
    right.set(xscale="log", yscale="log", xlabel="rate of the reference batch")
    right.set_title("two stages in two processes", fontsize="medium")
    canvas.suptitle("Pipelined backpropagation of the digits, five seeds, measured")
    canvas.savefig(figure, dpi=110)


def bars(axes: Any, x: list[float], lines: list[Line], **style: Any) -> None:
    """Means with their intervals, if there are any."""
    if lines:
        middle, low, high = np.array([line.loss for line in lines]).T
        axes.errorbar(x, middle, [middle - low, high - middle], marker="o", capsize=2, **style)
