"""Modelled step time of FSDP2 and ZeRO++ against the bandwidth between nodes; nothing is measured.

A GPT of 13 B parameters in bf16 on nodes of 8 ranks, one sequence of 2,048 tokens on each rank. The
bytes are those of `scaling.communication_bytes`, the times those of `scaling.step_time`, with the
rates below; all of them are assumptions. In the figure gathers and reduce-scatters go round a ring,
as large buffers do in NCCL. The rows also have every part sent directly, as the convention of bytes
counts: gathers and reduce-scatters then send about 8 times as much between nodes.

    PYTHONPATH=. python benchmarks/zeropp_model.py  # a few seconds

Writes `benchmarks/results/zeropp_model.csv` and `docs/zeropp_model.png`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ext import scaling

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "zeropp_model.csv"
FIGURE = ROOT / "docs" / "zeropp_model.png"
NODE = 8
WORLDS = (64, 256, 1024)
BANDWIDTHS = [10 ** (step / 12) for step in range(25)]  # GB/s of a node: 1 to 100
ROUTES = ("ring", "direct")
STRATEGIES = {"fsdp2": ("FSDP2, bf16", "C0"), "zeropp": ("ZeRO++: int8, hpZ, int4", "C1")}
TICKS = (1, 2, 5, 10, 20, 50, 100)
STYLES = dict(zip(WORLDS, (":", "--", "-"), strict=True))

LAYERS, WIDTH, VOCABULARY = 40, 5120, 50_257
UNITS, EMBEDDING = [12 * WIDTH**2] * LAYERS, VOCABULARY * WIDTH
PARAMS = sum(UNITS) + EMBEDDING
TOKENS = 2048
FLOPS = 150e12  # per second of one rank, about half of the peak of an A100
INTRA = 250e9  # bytes per second of one rank inside its node
LATENCY_S = 5e-6
# bf16 and int8 of the weights, bf16 and twice int4 of the gradients pass through memory once more.
QUANTIZED_BYTES, MEMORY = 6 * PARAMS, 1e12
SEQUENCE_S = 6 * PARAMS * TOKENS / FLOPS


def row(strategy: str, world: int, route: str, bandwidth: float) -> dict[str, Any]:
    """Bytes, time and break-even of one case; the bandwidth in GB/s of a node."""
    sent = scaling.communication_bytes(
        UNITS,
        world,
        NODE,
        strategy,
        root_params=EMBEDDING,
        weight_bytes=2,
        gradient_bytes=2,
        route=route,
    )
    links = scaling.Links(INTRA, bandwidth * 1e9 / NODE, LATENCY_S)
    compute = SEQUENCE_S + (QUANTIZED_BYTES / MEMORY if strategy == "zeropp" else 0)
    enough = scaling.break_even_bandwidth(sent, compute, intra_bandwidth=INTRA, latency_s=LATENCY_S)
    return {
        "route": route,
        "world": world,
        "ranks_per_node": NODE,
        "strategy": strategy,
        "node_gb_per_s": round(bandwidth, 3),
        "inter_bytes_per_rank": sent.total.inter_bytes,
        "intra_bytes_per_rank": sent.total.intra_bytes,
        "compute_s": round(compute, 4),
        "step_s": round(scaling.step_time(sent, links, compute), 4),
        "break_even_node_gb_per_s": round(enough * NODE / 1e9, 3),
        "break_even_sequences": round(scaling.break_even_micro_batch(sent, links, SEQUENCE_S), 3),
    }


def panel(axes: Axes, rows: list[dict[str, Any]], column: str) -> None:
    """One column against bandwidth, for each strategy and number of ranks."""
    for name, (label, colour) in STRATEGIES.items():
        for world, style in STYLES.items():
            chosen = [
                r for r in rows if (r["route"], r["strategy"], r["world"]) == ("ring", name, world)
            ]
            x, y = ([r[key] for r in chosen] for key in ("node_gb_per_s", column))
            axes.plot(x, y, style, color=colour, label=f"{label}, {world:,} ranks")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("bandwidth between nodes, GB/s of a node of 8 ranks")
    for which in (axes.xaxis, axes.yaxis):
        which.set_ticks(TICKS, labels=[f"{tick}" for tick in TICKS])
        which.set_minor_formatter("")
    axes.grid(which="both", alpha=0.2)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Step time, and the micro-batch that hides communication."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(SEQUENCE_S, color="0.5", lw=1, label="compute alone")
    panel(left, rows, "step_s")
    left.set(title="step time, one sequence per rank", ylabel="seconds")
    panel(right, rows, "break_even_sequences")
    right.set(title="communication hides behind compute above the line")
    right.set_ylabel("sequences of 2,048 tokens per rank")
    left.legend(fontsize="small")
    figure.suptitle("Model, not measured: 13 B parameters, 150 TFLOP/s per rank")
    figure.savefig(path, dpi=100)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints what the figure says at 100 Gbit/s, and from where on nothing is saved."""
    print("route world strategy inter_bytes step_s break_even_GB/s break_even_sequences")
    for each in rows:
        if each["node_gb_per_s"] == round(BANDWIDTHS[13], 3):
            found = [each["route"], each["world"], each["strategy"], each["inter_bytes_per_rank"]]
            print(*found, each["step_s"], each["break_even_node_gb_per_s"], end=" ")
            print(each["break_even_sequences"])


def main() -> None:
    """Every way, size, bandwidth and strategy."""
    rows = [
        row(strategy, world, route, bandwidth)
        for route in ROUTES
        for world in WORLDS
        for strategy in STRATEGIES
        for bandwidth in BANDWIDTHS
    ]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, FIGURE)
    show(rows)


if __name__ == "__main__":
    main()
