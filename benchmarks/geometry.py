"""Time what a measurement in another geometry adds to a step, on the language model's matrices.

    PYTHONPATH=. python benchmarks/geometry.py --device cpu

Side by side in one process: a step, and a measurement, which takes the gradients of 8 parts and
reduces them. A step is that of the optimizer alone, or with the forward and backward passes of 8
micro-batches of 16 windows. Muon's is momentum and five Newton–Schulz steps in float32 on the
matrices of the blocks, one after another as in torch.optim.Muon; AdamW's is on all parameters.
First it asserts the norms against singular values in float64. Rows go to
`benchmarks/results/geometry.csv`; `ratio` is that of a step with the measurement, spread over
`every_n_steps`, to one without.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks._rows import KEY, describe, name_of, write
from examples.language_model.module import GPT
from lightning_ext import functional
from lightning_ext._lightning import View
from lightning_ext.callbacks._noise._geometry import GeometryParts
from lightning_ext.callbacks._noise._parameter_groups import ParameterGroups

RESULTS = Path(__file__).resolve().parent / "results" / "geometry.csv"
PARTS, EVERY_N_STEPS = 8, 100
WIDTHS = {"language_model": 96, "language_model,width=384": 384}


class Alone(View):
    """One process without a Trainer."""

    def __init__(self) -> None:
        pass


def measured_of(model: GPT, geometry: str) -> list[Parameter]:
    """Parameters that the optimizer of this geometry would have."""
    named = model.named_parameters()
    return [p for name, p in named if geometry == "l1" or ("blocks" in name and p.ndim == 2)]


def passes(model: GPT, device: str) -> Callable[[], None]:
    """Forward and backward passes of all micro-batches of a step."""
    windows = torch.randint(256, (PARTS, 16, 65), dtype=torch.uint8, device=device)

    def run() -> None:
        model.zero_grad()
        for micro_batch in windows:
            (model.loss(micro_batch) / PARTS).backward()

    return run


def muon_step(parameters: list[Parameter]) -> Callable[[], None]:
    """Momentum and Newton–Schulz in float32."""
    buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step() -> None:
        for parameter, buffer in zip(parameters, buffers, strict=True):
            assert parameter.grad is not None
            buffer.lerp_(parameter.grad, 0.05)
            x = parameter.grad.lerp(buffer, 0.95)
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.T
                factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                x = torch.addmm(x, factor, x, beta=3.4445)
            x = x if x.shape == parameter.shape else x.T
            parameter.mul_(1 - 1e-4).add_(x, alpha=-1e-3)

    return step


def adamw_step(parameters: list[Parameter]) -> Callable[[], None]:
    """AdamW as torch has it by default."""
    optimizer = torch.optim.AdamW(parameters)
    return lambda: optimizer.step() and None


STEPS = {"l1": adamw_step, "nuclear": muon_step}
MODES = ("optimizer", "passes and optimizer")


def measure(geometry: str, parameters: list[Parameter], parts: list[list[Tensor]]) -> Any:
    """One measurement: what is added after each backward pass, and before the step."""
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    kept = GeometryParts(ParameterGroups(optimizer), optimizer, geometry)
    for gradients in parts:
        kept.add(list(gradients), 16, 1.0)
    found = kept.measure(Alone())
    assert found is not None
    return found[0]


def check(geometry: str, parameters: list[Parameter], parts: list[list[Tensor]]) -> None:
    """Assert the norms of a measurement against float64."""
    found = measure(geometry, parameters, parts)
    exact = [torch.stack(each).double().cpu() for each in zip(*parts, strict=True)]
    whole = [x.mean(0) for x in exact]
    if geometry == "l1":
        truth = sum(x.abs().sum().item() for x in whole)
    else:
        truth = sum(torch.linalg.svdvals(x).sum().item() for x in whole)
        each = [functional.small_gram(x - x.mean(0)).sum(0) * 16 / (PARTS - 1) for x in exact]
        roots = sum(torch.linalg.eigvalsh(x).clamp_min(0).sqrt().sum().item() for x in each)
        ours = sum(functional.trace_sqrt(x.float()).item() for x in each)
        assert abs(ours / roots - 1) < 2e-3, f"tr C^(1/2) {ours}, in float64 {roots}"
    assert abs(found.high / truth - 1) < 2e-3, f"{geometry} {found.high}, in float64 {truth}"


def timed(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Milliseconds of one call, over several in a row."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start) / repeats


def compare(geometry: str, shape: str, mode: str, device: str, pairs: int) -> dict[str, str]:
    """Assert accuracy, then time steps and measurements in turn."""
    torch.manual_seed(0)
    model = GPT(width=WIDTHS[shape]).to(device)
    parameters = measured_of(model, geometry)
    run = passes(model, device)
    run()
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    parts = [[g + 3 * g.std() * torch.randn_like(g) for g in grads] for _ in range(PARTS)]
    check(geometry, parameters, parts)
    step = STEPS[geometry](parameters)

    def whole_step() -> None:
        run()
        step()

    calls: list[tuple[Callable[[], Any], int]] = [
        (step, 5) if mode == "optimizer" else (whole_step, 1),
        (lambda: measure(geometry, parameters, parts), 1),
    ]
    for call, repeats in calls:
        timed(call, device, repeats)
    times = np.empty((pairs, 2))
    for pair in range(pairs):
        for place in (0, 1) if pair % 2 else (1, 0):
            times[pair, place] = timed(calls[place][0], device, calls[place][1])
    ratios = 1 + times[:, 1] / times[:, 0] / EVERY_N_STEPS
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    found = {"ratio": median(ratios), "low": low, "high": high}
    found |= {"ms_step": np.median(times[:, 0]), "ms_measurement": np.median(times[:, 1])}
    figures = {name: f"{value:.4g}" for name, value in found.items()}
    return figures | {"pairs": str(pairs), "every_n_steps": str(EVERY_N_STEPS)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure every geometry at every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--shapes", nargs="+", choices=WIDTHS, default=["language_model"])
    parser.add_argument("--geometries", nargs="+", choices=STEPS, default=list(STEPS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape, geometry, mode in itertools.product(args.shapes, args.geometries, MODES):
        key = ("noise scale", geometry, mode, "float32", shape, name_of(args.device))
        found = compare(geometry, shape, mode, args.device, args.pairs)
        rows.append(dict(zip(KEY, key, strict=True)) | found | describe())
        print(geometry, mode, shape, found)
    write(rows, RESULTS)


if __name__ == "__main__":
    main()
