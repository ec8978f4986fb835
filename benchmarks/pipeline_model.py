"""Modelled time of pipeline schedules against batch and ranks; nothing is measured.

A GPT of 52 B parameters in bf16, by `scaling.advise_pipeline`: of each schedule the fastest layout
that fits the memory. A rank of the model is a node of 8 GPUs that share each layer (tensor
parallelism). Rates and overheads below are assumptions. The first table and the left of the figure
have throughput against the samples of a GPU and step; the second and the right the time to a target
that takes 10,000 steps at least, under two critical batches. What the four schedules do with 8
micro-batches on 4 ranks is drawn by `scaling.pipeline_timeline`.

    PYTHONPATH=. python benchmarks/pipeline_model.py  # ten seconds

Writes `benchmarks/results/pipeline_model.csv`, `docs/pipeline_model.png` and
`docs/pipeline_schedules.png`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._rows import describe
from lightning_ext import scaling

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "pipeline_model.csv"
FIGURE, SCHEDULES = ROOT / "docs" / "pipeline_model.png", ROOT / "docs" / "pipeline_schedules.png"
LINES = {
    "data_parallel": ("data parallel alone", "0.5"),
    "gpipe": ("GPipe", "C2"),
    "1f1b": ("1F1B", "C1"),
    "interleaved_1f1b": ("depth-first (interleaved 1F1B)", "C3"),
    "breadth_first": ("breadth-first", "C0"),
}
NODE = 8
GPUS = (64, 128, 256, 512, 1024, 2048, 4096)
FIXED = 256
SAMPLES = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
CRITICAL = (500, 4000)  # sequences: 1 M and 8 M tokens
MIN_STEPS = 10_000

LAYERS, WIDTH, TOKENS = 64, 8192, 2048
FLOPS = NODE * 150e12  # per second, about half of the peak of 8 A100
OVERHEAD_S = 6e-4  # of a layer and micro-batch: launching kernels, sharing layers
MEMORY = NODE * 80e9
LATENCY_S = 5e-6
NETWORKS = {"200 Gbit/s a node": 25e9, "1,600 Gbit/s a node": 200e9}
SHOWN = "200 Gbit/s a node"
GPT = scaling.PipelineModel(
    layers=LAYERS,
    layer_params=12 * WIDTH**2,
    layer_s=6 * 12 * WIDTH**2 * TOKENS / FLOPS,
    boundary_bytes=2 * WIDTH * TOKENS,
    stashed_bytes=34 * WIDTH * TOKENS,
    overhead_s=OVERHEAD_S,
)


def row(
    table: str, network: str, gpus: int, schedule: str, commit: str, **settings: Any
) -> dict[str, Any]:
    """The fastest layout of one schedule."""
    bandwidth = NETWORKS[network]
    links = scaling.Links(bandwidth, bandwidth, LATENCY_S)
    cluster = scaling.PipelineCluster(gpus // NODE, MEMORY, links, ranks_per_node=1)
    best = scaling.advise_pipeline(
        GPT, cluster, schedules=[schedule], min_steps=MIN_STEPS, **settings
    )[0]
    per_second = best.global_batch / best.step_s / gpus
    return {
        "table": table,
        "network": network,
        "gpus": gpus,
        "critical_batch": settings["critical_batch"] if table == "target" else "",
        "most_samples_per_gpu": settings.get("max_global_batch", 0) / gpus or "",
        "schedule": schedule,
        "data_parallel": best.data_parallel,
        "pipeline_ranks": best.pipeline_ranks,
        "stages_per_rank": best.stages_per_rank,
        "data_parallel_size": best.data_parallel_size,
        "micro_batch": best.micro_batch,
        "num_microbatches": best.num_microbatches,
        "global_batch": best.global_batch,
        "recompute": best.recompute,
        "bubble_fraction": round(best.bubble_fraction, 4),
        "utilization": round(best.utilization, 4),
        "tflops_per_gpu": round(per_second * LAYERS * GPT.layer_s * FLOPS / 1e12, 2),
        "memory_gb_per_gpu": round(best.memory_bytes / 1e9 / NODE, 2),
        "sent_gb_per_node": round(best.sent_bytes / 1e9, 3),
        "step_s": round(best.step_s, 4),
        "target_days": round(best.target_s / 86_400, 4) if table == "target" else "",
        "commit": commit,
    }


def all_rows() -> list[dict[str, Any]]:
    """Throughput by samples of a rank, then time to the target by ranks."""
    commit = describe()["commit"]
    # No batch is critical: the largest throughput wins.
    throughput = [
        row(
            "throughput",
            network,
            FIXED,
            schedule,
            commit,
            critical_batch=1e15,
            max_global_batch=int(samples * FIXED),
        )
        for network in NETWORKS
        for schedule in LINES
        for samples in SAMPLES
    ]
    target = [
        row("target", network, gpus, schedule, commit, critical_batch=critical)
        for network in NETWORKS
        for critical in CRITICAL
        for schedule in LINES
        for gpus in GPUS
    ]
    return throughput + target


def panel(axes: Axes, rows: list[dict[str, Any]], x: str, y: str) -> None:
    """A line for each schedule."""
    for schedule, (label, colour) in LINES.items():
        chosen = [each for each in rows if each["schedule"] == schedule]
        points = [[each[key] for each in chosen] for key in (x, y)]
        style = "--" if schedule == "interleaved_1f1b" else "-"
        axes.plot(*points, style, color=colour, marker="o", ms=3, label=label)
    ticks = sorted({each[x] for each in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
    axes.grid(alpha=0.3)


def draw(rows: list[dict[str, Any]]) -> None:
    """Utilization by samples of a rank, and days by ranks under each critical batch."""
    shown = [each for each in rows if each["network"] == SHOWN]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, *others = figure.subplots(1, 3)
    throughput = [each for each in shown if each["table"] == "throughput"]
    panel(left, throughput, "most_samples_per_gpu", "utilization")
    left.set(title=f"{FIXED} GPUs", xlabel="samples of a GPU and step, at most")
    left.set(ylabel="part of the step that computes", ylim=(0, 1))
    for axes, critical in zip(others, CRITICAL, strict=True):
        panel(axes, [e for e in shown if e["critical_batch"] == critical], "gpus", "target_days")
        axes.set(title=f"critical batch {critical:,}", xlabel="GPUs", yscale="log")
        axes.set(ylabel="days to the target", ylim=(0.2, 50))
        days = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
        axes.set_yticks(days, labels=[f"{day:g}" for day in days])
        axes.set_yticks([], minor=True)
    left.legend(fontsize="small", loc="lower right")
    figure.suptitle(
        f"Model, not measured: 52 B parameters, {SHOWN}, nodes of 8 GPUs of 80 GB, 150 TFLOP/s each"
    )
    figure.savefig(FIGURE, dpi=100)


def draw_schedules() -> None:
    """The four schedules on four ranks, with the same layers on each rank."""
    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    handles: list[Any] = []
    axes_of = figure.subplots(4, 1, sharex=True)
    for axes, schedule in zip(axes_of, scaling.PIPELINE_SCHEDULES, strict=True):
        loops = 1 if schedule in ("gpipe", "1f1b") else 2
        timeline = scaling.pipeline_timeline(
            schedule,
            pipeline_ranks=4,
            stages_per_rank=loops,
            num_microbatches=8,
            forward_ms=2 / loops,
            backward_ms=4 / loops,
        )
        found = timeline.draw(axes)
        handles = max(handles, found, key=len)
    axes_of[-1].set_xlabel("ms")
    axes_of[-1].set_xlim(0, 66)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.savefig(SCHEDULES, dpi=120)


def main() -> None:
    """Rows, then both figures."""
    rows = all_rows()
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows)
    draw_schedules()
    for each in rows:
        if each["network"] == SHOWN:
            print(*(f"{key}={each[key]}" for key in list(each)[2:-1] if each[key] != ""))


if __name__ == "__main__":
    main()
