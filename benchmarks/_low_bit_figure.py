"""The figure of low_bit_loss.py: losses beside the band of float32, and against bytes of states."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"  # Okabe and Ito
FAMILIES = {"few bits": (BLUE, "o"), "factored": (GREEN, "s"), "low rank": (ORANGE, "^")}
# Where labels would lie on each other, in points from the mark; else (6, 3).
LABELS = {
    "int8": (-6, -12),
    "fp8": (-20, -3),
    "bfloat16": (-4, 6),
    "GradNormLoRP": (-48, 8),
    "Q-GaLore": (-4, 6),
    "Q-GaLore, float32 weights": (-6, -26),
}
Found = dict[str, tuple[list[float], float]]


def draw(rows: Path, figure: Path, shape: str) -> None:
    """Draws validation losses by seed, and their means against bytes of states.

    Args:
        rows: the file of results.
        figure: the file to write.
        shape: of the rows to draw.
    """
    from matplotlib.figure import Figure

    found = losses(rows, shape)
    if "float32" not in found:
        return
    canvas = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = canvas.subplots(1, 2, width_ratios=(1.15, 1))
    by_seed(left, found)
    against_bytes(right, found)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len(found["float32"][0])
    canvas.suptitle(f"GPT of 0.5 M parameters, {shape}, measured; band: float32, {seeds} seeds")
    canvas.savefig(figure, dpi=110)


def losses(rows: Path, shape: str) -> Found:
    """Validation losses by seed and bytes of states of each method, float32 first."""
    found: Found = {}
    with rows.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["shape"] == shape and "lr" not in row["mode"]:
                part = found.setdefault(row["variant"], ([], float(row["state_bytes"])))
                part[0].append(float(row["val_loss"]))
    return dict(sorted(found.items(), key=lambda x: (x[0] != "float32", mean(x[1][0]))))


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def family(name: str) -> tuple[str, str]:
    """Color and marker."""
    if name == "float32":
        return BLACK, "D"
    if name.startswith("CAME"):
        return FAMILIES["factored"]
    return FAMILIES["few bits" if name in ("bfloat16", "int8", "fp8", "int4") else "low rank"]


def by_seed(axes: Any, found: Found) -> None:
    """A line for each method: its seeds, and their mean."""
    axes.axvspan(*band(found), color=BLACK, alpha=0.12, linewidth=0)
    for place, (name, (values, _)) in enumerate(found.items()):
        color, marker = family(name)
        axes.plot(values, [place] * len(values), "|", color=color, markersize=9)
        axes.plot(mean(values), place, marker, color=color, markersize=6)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("validation loss, nats a byte: seeds and their mean")


def against_bytes(axes: Any, found: Found) -> None:
    """The mean of each method over its bytes a parameter."""
    axes.axhspan(*band(found), color=BLACK, alpha=0.12, linewidth=0)
    for name, (values, size) in found.items():
        color, marker = family(name)
        axes.plot(size, mean(values), marker, color=color, markersize=6)
        near, at = LABELS.get(name, (6, 3)), (size, mean(values))
        label = name.replace(", float32", ",\nfloat32")
        axes.annotate(label, at, near, textcoords="offset points", fontsize="x-small")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlim(0.65, 13)
    axes.set(xlabel="bytes of states a parameter, measured", ylabel="validation loss, nats a byte")
    for name, (color, marker) in FAMILIES.items():
        axes.plot([], [], marker, color=color, label=name)
    axes.legend(fontsize="small", frameon=False)


def band(found: Found) -> tuple[float, float]:
    """The lowest and the highest loss of float32."""
    values = found["float32"][0]
    return min(values), max(values)
