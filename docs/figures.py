"""Draw the pictures of the documentation that belong to no single benchmark.

    python docs/figures.py            # docs/architecture.png, docs/loop.png, docs/memory.png
    python docs/figures.py --out /tmp # elsewhere

`architecture` and `loop` are diagrams. `memory` has bytes of two models by strategy and by format
of the optimizer's states: on the left those of the GPT of `examples/language_model`, counted by
`callbacks.memory_plan`; on the right those of a model of 6.4 billion parameters, by the formulas of
`scaling.sharded_memory`, with the bytes of states of `benchmarks/results/low_bit.csv`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.language_model.module import GPT
from lightning_ext.callbacks import memory_plan
from lightning_ext.functional import saved_bytes
from lightning_ext.optim import LowBitAdamW
from lightning_ext.scaling import sharded_memory

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's colours, which are told apart without red and green.
BLUE, SKY, ORANGE, GREEN, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7"
GREY = "#7F7F7F"
PARTS = {
    "weights": (BLUE, ""),
    "gradients": (SKY, "//"),
    "optimizer states": (ORANGE, ""),
    "activations": (GREEN, ".."),
    "gathered, copies": (PURPLE, "xx"),
}
RESULTS = ROOT / "benchmarks" / "results" / "low_bit.csv"
FORMATS = ("float32", "int8", "int4")
RANKS, LARGE_RANKS, NODE = 4, 16, 8
LAYERS, WIDTH, HEADS, TOKENS = 32, 4096, 32, 2048
Row = tuple[str, Sequence[float]]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose units are tenths of an inch."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, title: str, text: str, c: str) -> None:
    """A box with a bold first line and what is in it."""
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1.2")
    shape.set(facecolor=c + "2E", edgecolor=c, linewidth=1.6)
    axes.add_patch(shape)
    middle = x + w / 2
    axes.text(middle, y + h - 1, title, ha="center", va="top", fontsize=11, weight="bold")
    style = {"ha": "center", "va": "center", "fontsize": 10, "linespacing": 1.3}
    axes.text(middle, y + (h - 2.2) / 2, text, **style)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0
) -> None:
    """An arrow from one point to another."""
    style = {"arrowstyle": "-|>", "lw": 1.6, "color": "0.25", "mutation_scale": 15}
    style["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", end, start, arrowprops=style)


def architecture() -> Figure:
    """The rooms, each above those it imports, and the way of one optimizer step through them."""
    figure, axes = canvas(10, 7.5)
    rooms = [
        (1, 63, 23, "callbacks", "measure, decide, average, log", BLUE),
        (26, 63, 23, "strategies", "fsdp2, zeropp, pipelines", BLUE),
        (1, 52, 48, "_lightning", "the only place with Lightning's private parts; views", PURPLE),
        (1, 41, 11, "optim", "optimizers", ORANGE),
        (13.3, 41, 11, "losses", "modules", ORANGE),
        (25.6, 41, 11, "nn", "layers", ORANGE),
        (37.9, 41, 11, "data", "samplers", ORANGE),
        (1, 30, 48, "kernels", "faster twins; only kernels/_triton imports triton", GREEN),
        (1, 19, 48, "functional", "each formula of tensors once; torch only", GREEN),
        (1, 8, 48, "scaling", "each formula of numbers once; no torch", SKY),
    ]
    for x, y, width, name, text, colour in rooms:
        box(axes, x, y, width, 8, name, text, colour)
    for above in (63, 52, 41, 30, 19):
        arrow(axes, (25, above), (25, above - 3))
    axes.text(25, 5, "a room imports only from lines below it", ha="center", va="center")
    steps = [
        ("sampler", "data: the next micro-batch of this rank", ORANGE),
        ("module", "forward, backward; loss × weight", GREY),
        ("noise statistics", "functional: norms of parts; view: over ranks", GREEN),
        ("optimizer", "optim, kernels: a step at the scaled rate", ORANGE),
        ("EMA, logs", "callbacks: by samples, not by steps", BLUE),
        ("rule", "scaling: noise scale → target batch", SKY),
        ("new sizes and rates", "scaling splits, view sets, sampler obeys", PURPLE),
    ]
    for place, (title, text, colour) in enumerate(steps):
        y = 64.5 - 9.4 * place
        box(axes, 60, y, 38, 6.5, title, text, colour)
        if place:
            arrow(axes, (79, y + 9.4), (79, y + 6.5))
    axes.plot((60, 55, 55), (11.4, 11.4, 67.7), color="0.25", lw=1.6)
    arrow(axes, (54.8, 67.7), (60, 67.7))
    axes.text(79, 5, "one optimizer step", ha="center", va="center")
    axes.text(25, 73, "rooms", ha="center", va="center", fontsize=13, weight="bold")
    axes.text(79, 73, "loop", ha="center", va="center", fontsize=13, weight="bold")
    return figure


def loop() -> Figure:
    """Measure, decide, change, keep consistent, log; and again."""
    figure, axes = canvas(8.4, 3.6)
    measure = "GradientNoiseScale:\nnorms of parts of a batch,\nwith an interval"
    decide = "a rule or a schedule\nproposes a batch; limits\nand pauses damp it"
    change = "between two windows:\nmicro-batch first,\nthen accumulation"
    consistent = "learning rate, betas, Adam's step count,\nEMA and schedules by samples,"
    consistent += "\nposition in the data, lengths"
    logged = "global_batch, noise_scale,\nlr_scaled, samples_seen"
    box(axes, 1, 23, 25, 12, "measure", measure, GREEN)
    box(axes, 29.5, 23, 25, 12, "decide", decide, SKY)
    box(axes, 58, 23, 25, 12, "change", change, ORANGE)
    box(axes, 44, 2, 39, 12, "keep consistent", consistent, BLUE)
    box(axes, 1, 2, 37, 12, "log", logged, PURPLE)
    arrow(axes, (26, 29), (29.5, 29))
    arrow(axes, (54.5, 29), (58, 29))
    arrow(axes, (70.5, 23), (70.5, 14))
    arrow(axes, (44, 8), (38, 8))
    arrow(axes, (13.5, 14), (13.5, 23))
    axes.text(15, 18.5, "next step", va="center", fontsize=10)
    return figure


def state_bytes() -> dict[str, float]:
    """Measured bytes of AdamW's states for each parameter of a matrix, by format."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = [x for x in csv.DictReader(file) if x["thing"] == "LowBitAdamW"]
    kept = {x["variant"].removeprefix("state_dtype="): x["bytes"] for x in rows}
    return {name: float(kept[name]) for name in FORMATS}


def counted() -> list[Row]:
    """MB of a rank for the language model, one window a rank, by `memory_plan`."""
    module, window = GPT(), torch.zeros(1, 65, dtype=torch.uint8)
    cases = [("single", 1, name) for name in FORMATS] + [("ddp", RANKS, "float32")]
    cases += [("fsdp2", RANKS, name) for name in FORMATS] + [("zeropp", RANKS, "float32")]
    rows: list[Row] = []
    for strategy, ranks, name in cases:
        plan = memory_plan(
            module,
            optimizer=partial(LowBitAdamW, state_dtype=name),
            micro_batch=window,
            strategy=strategy,
            devices=ranks,
            units=list(module.blocks),
        )
        whole = plan.gathered_bytes + plan.copies_bytes
        parts = (
            plan.weights_bytes,
            plan.gradients_bytes,
            plan.states_bytes,
            plan.activations_bytes,
        )
        rows.append((f"{strategy} × {ranks}, {name}", [part / 1e6 for part in (*parts, whole)]))
    return rows


def modelled() -> list[Row]:
    """GB of a rank for 6.4 B parameters in float32, one sequence of 2,048 tokens, by formulas."""
    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0, activation="gelu", batch_first=True, norm_first=True
        ).bfloat16()
        sequence = torch.empty(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    params = LAYERS * sum(p.numel() for p in layer.parameters())
    activations = LAYERS * saved_bytes(layer, sequence)
    cases = [("ddp", name) for name in FORMATS] + [("fsdp2", name) for name in FORMATS]
    rows: list[Row] = []
    for strategy, name in [*cases, ("zeropp", "float32"), ("zeropp", "int4")]:
        held = sharded_memory(
            params, LARGE_RANKS, NODE, strategy, optimizer_bytes=state_bytes()[name]
        )
        parts = (held.weights, held.gradients, held.optimizer, activations, held.secondary)
        rows.append((f"{strategy} × {LARGE_RANKS}, {name}", [part / 1e9 for part in parts]))
    return rows


def bars(axes: Axes, rows: Sequence[Row], title: str, unit: str) -> None:
    """A stacked bar for each row, with its sum behind it."""
    names = [name for name, _ in rows]
    lefts = [0.0] * len(rows)
    for index, (part, (colour, hatch)) in enumerate(PARTS.items()):
        widths = [parts[index] for _, parts in rows]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
        axes.barh(names, widths, left=lefts, label=part, **style)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for name, total in zip(names, lefts, strict=True):
        axes.text(total, name, f" {total:.3g}", va="center", fontsize=10)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit, xlim=(0, 1.14 * max(lefts)))
    axes.spines[["top", "right"]].set_visible(False)


def memory() -> Figure:
    """Bytes of a rank by strategy and format: counted on the left, a model on the right."""
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars(left, counted(), "GPT of 0.5 M parameters,\ncounted by memory_plan", "MB on a rank")
    bars(
        right,
        modelled(),
        "Model, not measured: 6.4 B\nparameters, nodes of 8 ranks",
        "GB on a rank",
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), fontsize=10)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "architecture": architecture,
    "loop": loop,
    "memory": memory,
}


def main() -> None:
    """Draw those asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    for name in args.names or FIGURES:
        FIGURES[name]().savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
