"""Time `step()` of optimizers for small memory next to their peers, and count their bytes.

    pip install --target /tmp/peers --no-deps pytorch_optimizer torchao
    PYTHONPATH=/tmp/peers python benchmarks/low_bit.py --device cpu

All in one process and in turn, with torch's fused AdamW as an anchor. First it asserts that 19
steps are near those of the formula in float64: `error` is their distance as a share of the way. A
peer whose definition differs is told apart in its row. `first_ms` is the first step, which makes
states; what torchao compiles, it has compiled by then. Optimizers of low rank are timed over cycles
of 20 steps, in which each subspace is looked for once; `ms` is that of one step. Rows go to
`benchmarks/results/low_bit.csv`. Those of peers have the time of the peer to ours as `ratio`, the
row of `lightning_ext` ours to that of the fastest peer. `bytes` are those of states for each
parameter, of the storages that there are; rows of mode "states" are these of all optimizers and
formats.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._low_bit_bytes import FORMATS, MATRICES, classes, measured, state_bytes
from benchmarks._low_bit_peers import THINGS, Thing, Variant
from benchmarks._optimizer_peers import ANCHOR, OURS
from benchmarks._pairs import in_turn
from benchmarks._peers import present, versions_of
from benchmarks._rows import KEY, describe, name_of, write
from benchmarks.optimizers import figures, parameters

RESULTS = Path(__file__).resolve().parent / "results" / "low_bit.csv"
PACKAGES = ("bitsandbytes", "torchao", "pytorch_optimizer")
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "16 x (256 x 256 + 256)": [(256, 256), (256,)] * 16,
    "4 x 1024 x 1024": [(1024, 1024)] * 4,
}
CHECKED = 4  # tensors whose steps are compared
STEPS = 19  # the peers look for subspaces at the 20th, ours at the 21st
NO_TIMES = dict.fromkeys(("base", "ratio", "low", "high", "ms", "ms_base", "pairs", "first_ms"), "")


def found(thing: Thing) -> dict[str, Variant]:
    """Variants whose packages are installed."""
    return {name: x for name, x in thing.variants.items() if present(x.package)}


def way(variant: Variant, shape: str, device: str, dtype: torch.dtype) -> Tensor:
    """Where 19 steps of random gradients take the first parameters of a shape."""
    params = parameters(SHAPES[shape][:CHECKED], device, dtype)
    before = [p.detach().clone() for p in params]
    optimizer, draw = variant(params), torch.Generator().manual_seed(1)
    sizes = [(torch.randn(p.shape, generator=draw) / 2).exp() for p in params]
    for _ in range(STEPS):
        for p, size in zip(params, sizes, strict=True):
            p.grad = (size * torch.randn(p.shape, generator=draw)).to(device, dtype)
        optimizer.step()
    pairs = zip(params, before, strict=True)
    return torch.cat([(p.detach() - x).double().flatten() for p, x in pairs])


def errors(name: str, shape: str, device: str) -> dict[str, float]:
    """Distances from the formula in float64; asserts them, but of those that differ."""
    thing = THINGS[name]
    truth = way(thing.truth, shape, device, torch.float64)
    distances = {}
    for variant, made in found(thing).items():
        if variant == ANCHOR and not name.startswith("AdamW"):
            continue
        moved = way(made, shape, device, torch.float32)
        distances[variant] = error = ((moved - truth).norm() / truth.norm()).item()
        assert made.differs or error < thing.tolerance, f"{name} of {variant}: error {error:.2g}"
    return distances


def first_step(optimizer: Optimizer) -> float:
    """Milliseconds of it."""
    start = time.perf_counter()
    optimizer.step()
    return 1e3 * (time.perf_counter() - start)


def steps_of(optimizer: Optimizer, count: int) -> Any:
    """Some steps in a row."""

    def call() -> None:
        for _ in range(count):
            optimizer.step()

    return call


def rows_of(name: str, shape: str, device: str, threads: int, pairs: int) -> list[dict[str, str]]:
    """Assert accuracy, then time all in turn."""
    thing, distances = THINGS[name], errors(name, shape, device)
    made = {x: y(parameters(SHAPES[shape], device, torch.float32)) for x, y in found(thing).items()}
    firsts = {variant: first_step(optimizer) for variant, optimizer in made.items()}
    calls = {variant: steps_of(optimizer, thing.steps) for variant, optimizer in made.items()}
    times = {x: y / thing.steps for x, y in in_turn(calls, device, pairs).items()}
    medians = {variant: float(np.median(x)) for variant, x in times.items()}
    others = [x for x in made if not x.startswith(OURS) and x != ANCHOR]
    best = min(others or [ANCHOR], key=lambda variant: medians[variant])
    rows = []
    for variant in made:
        base = best if variant == OURS else OURS
        mode = "step" if thing.steps == 1 else f"step, mean of {thing.steps}"
        row = key(name, variant, mode, shape, name_of(device, threads)) | {"base": base}
        row |= figures(times[variant], times[base], pairs)
        row |= {"first_ms": f"{firsts[variant]:.4g}", "bytes": f"{state_bytes(made[variant]):.4g}"}
        row |= {"error": f"{distances[variant]:.2g}" if variant in distances else ""}
        rows.append(row | {"differs": thing.variants[variant].differs} | versions())
    print(name, shape, f"{threads} threads", {x: f"{y:.2f} ms" for x, y in medians.items()})
    print(f"  over {best}: {rows[0]['ratio']} ({rows[0]['low']} to {rows[0]['high']})", flush=True)
    return rows


def rows_of_bytes() -> list[dict[str, str]]:
    """Bytes of states for each parameter, of all optimizers and formats."""
    rows = []
    for name, format in itertools.product(classes(), FORMATS):
        bytes_of = f"{measured(name, format):.4g}"
        row = key(name, f"state_dtype={format}", "states", MATRICES, "any") | NO_TIMES
        rows.append(row | {"bytes": bytes_of, "error": "", "differs": ""} | versions())
        print(name, format, bytes_of, flush=True)
    return rows


def key(thing: str, variant: str, mode: str, shape: str, device: str) -> dict[str, str]:
    """What a row is of."""
    return dict(zip(KEY, (thing, variant, mode, "float32", shape, device), strict=True))


def versions() -> dict[str, str]:
    """Where rows are from, and which peers were there."""
    return describe("torch") | versions_of(*PACKAGES)


def main() -> None:
    """Measure every optimizer at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--things", nargs="*", choices=THINGS, default=list(THINGS))
    parser.add_argument("--bytes", action="store_true", help="count those of all formats, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows go")
    args = parser.parse_args()
    begun, written = time.perf_counter(), []
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module=r"torch\._functorch.*")
    for shape, name in itertools.product(args.shapes, args.things):
        if shape in (THINGS[name].shapes or args.shapes):
            written += rows_of(name, shape, args.device, args.threads, args.pairs)
            write(written, args.results)
    if args.bytes:
        written += rows_of_bytes()
    write(written, args.results)
    print(f"{len(written)} rows in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
