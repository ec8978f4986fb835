"""Time `step()` of the optimizers next to those of pytorch_optimizer and timm.

    pip install --target /tmp/peers --no-deps pytorch_optimizer timm
    PYTHONPATH=/tmp/peers python benchmarks/optimizers.py --device cpu

All in one process and in turn, each peer in the faster of its forms (a loop, or `foreach`; not
compiled), with torch's fused AdamW as an anchor. timm is read without torchvision. First it asserts
three steps of ours against the plain formula in float64, and those of each peer against ours unless
their definitions differ, which its row tells. Rows go to `benchmarks/results/optimizers.csv`. Those
of peers have the time of the peer to ours as `ratio`, the row of `lightning_ext` ours to that of
the fastest peer. `bytes` and `bytes_base` are those of states for each parameter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._optimizer_peers import ANCHOR, FUSED_ADAMW, OURS, THINGS, Maker, Thing
from benchmarks._pairs import Times, in_turn, interval
from benchmarks._peers import present, versions_of
from benchmarks._rows import KEY, describe, name_of, write

RESULTS = Path(__file__).resolve().parent / "results" / "optimizers.csv"
PACKAGES = ("pytorch_optimizer", "timm")
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "16 x (256 x 256 + 256)": [(256, 256), (256,)] * 16,
    "96 x 512 x 512": [(512, 512)] * 96,
    "800 x 25 x 83": [(25, 83)] * 800,
}
REPEATS = {"16 x (256 x 256 + 256)": 3}  # steps in a row
CHECKED = 8  # tensors whose steps are compared


def parameters(shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[Parameter]:
    """Parameters with gradients, the same ones in every dtype."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        values, grad = torch.randn(2, *shape, generator=draw).to(device, dtype)
        made.append(Parameter(values.clone()))
        made[-1].grad = grad.clone()
    return made


def build(maker: Maker, params: list[Parameter], settings: dict[str, Any]) -> Optimizer:
    """An optimizer of matrices and vectors."""
    matrices = [p for p in params if p.dim() > 1]
    return maker(matrices, [p for p in params if p.dim() < 2], **settings)


def moved(
    maker: Maker, shape: str, device: str, settings: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    """Where three steps take the first parameters of a shape; peers may change gradients."""
    params = parameters(SHAPES[shape][:CHECKED], device, dtype)
    grads = [p.grad.clone() for p in params if p.grad is not None]
    before = [p.detach().clone() for p in params]
    optimizer = build(maker, params, settings)
    for _ in range(3):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    pairs = zip(params, before, strict=True)
    return torch.cat([(p.detach() - x).double().flatten() for p, x in pairs])


def check(name: str, shape: str, device: str) -> None:
    """Assert our steps against the formula in float64, and those of peers against ours."""
    thing = THINGS[name]
    plain = thing.settings | {"foreach": False}
    truth = moved(thing.ours, shape, device, plain, torch.float64)
    for maker in (thing.ours, *(x for x in found_peers(thing) if not x.differs)):
        for form in maker.forms.values():
            steps = moved(maker, shape, device, thing.settings | form, torch.float32)
            error = ((steps - truth).norm() / truth.norm()).item()
            assert error < thing.tolerance, f"{name} of {maker.package}: relative error {error:.2g}"


def found_peers(thing: Thing) -> list[Maker]:
    """Peers that are installed."""
    return [x for x in thing.peers if present(x.package)]


def optimizers(thing: Thing, shape: str, device: str) -> dict[str, tuple[Optimizer, str]]:
    """Ours, torch's AdamW and each peer in its fastest form, by package, with that form."""

    def make(maker: Maker, settings: dict[str, Any]) -> Optimizer:
        return build(maker, parameters(SHAPES[shape], device, torch.float32), settings)

    made = {OURS: (make(thing.ours, thing.settings), ""), ANCHOR: (make(FUSED_ADAMW, {}), "")}
    for peer in found_peers(thing):
        forms = {form: make(peer, thing.settings | how) for form, how in peer.forms.items()}
        times = in_turn({x: y.step for x, y in forms.items()}, device, rounds=3)
        best = min(forms, key=lambda form: float(times[form].min()))
        made[peer.package] = forms[best], best
    return made


def state_bytes(optimizer: Optimizer) -> float:
    """Bytes of states for each parameter, counts of steps and all."""
    states = optimizer.state.values()
    tensors = [x for state in states for x in state.values() if isinstance(x, Tensor)]
    entries = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(x.numel() * x.element_size() for x in tensors) / entries


def rows_of(name: str, shape: str, device: str, threads: int, pairs: int) -> list[dict[str, str]]:
    """Assert accuracy, then time all in turn."""
    check(name, shape, device)
    thing = THINGS[name]
    made = optimizers(thing, shape, device)
    calls = {variant: optimizer.step for variant, (optimizer, _) in made.items()}
    times = in_turn(calls, device, pairs, REPEATS.get(shape, 1))
    medians = {variant: float(np.median(x)) for variant, x in times.items()}
    others = [x for x in made if x not in (OURS, ANCHOR)]
    best = min(others or [ANCHOR], key=lambda variant: medians[variant])
    rows = []
    for variant in made:
        base = best if variant == OURS else OURS
        key = (name, variant, "step", "float32", shape, name_of(device, threads))
        row = dict(zip(KEY, key, strict=True)) | {"base": base}
        row |= figures(times[variant], times[base], pairs)
        row |= {"bytes": f"{state_bytes(made[variant][0]):.4g}"}
        row |= {"bytes_base": f"{state_bytes(made[base][0]):.4g}", "form": made[variant][1]}
        rows.append(row | {"differs": difference(thing, variant)} | versions())
    print(name, shape, f"{threads} threads", {x: f"{y:.2f} ms" for x, y in medians.items()})
    print(f"  over {best}: {rows[0]['ratio']} ({rows[0]['low']} to {rows[0]['high']})", flush=True)
    return rows


def figures(times: Times, base: Times, pairs: int) -> dict[str, str]:
    """The ratio of two, its interval and the times."""
    found = interval(times / base)
    found |= {"ms": float(np.median(times)), "ms_base": float(np.median(base))}
    return {name: f"{value:.4g}" for name, value in found.items()} | {"pairs": str(pairs)}


def difference(thing: Thing, variant: str) -> str:
    """In what a peer's definition is not ours."""
    if variant in (OURS, ANCHOR):
        return ""
    return next(x.differs for x in thing.peers if variant == x.package)


def versions() -> dict[str, str]:
    """Where rows are from, and which peers were there."""
    return describe("torch") | versions_of(*PACKAGES)


def main() -> None:
    """Measure every optimizer at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--things", nargs="+", choices=THINGS, default=list(THINGS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows go")
    args = parser.parse_args()
    begun, written = time.perf_counter(), []
    threads = args.threads if args.device == "cpu" else [1]
    for count, shape, name in itertools.product(threads, args.shapes, args.things):
        if shape in (THINGS[name].shapes or args.shapes):
            torch.set_num_threads(count)
            written += rows_of(name, shape, args.device, count, args.pairs)
    write(written, args.results)
    print(f"{len(written)} rows in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
