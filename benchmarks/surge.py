"""Finds the best learning rate of a sign-like optimizer by a sweep, batch by batch.

Two problems. A noisy quadratic with a curvature that is shared between coordinates, whose noise
scale is known from how it is made; the surge law (arXiv:2405.14578) has its peak there:

    L(w) = -g·Σw_i + ½·h·Σw_i² + ½·(c/d)·(Σw_i)²,   gradients of samples G + N(0, σ²)
    B_noise = π·σ²·tr H / (2·g²·Σ_{i≠j} H_ij)

And scikit-learn's digits under a small CNN, stopped at a point; its noise scale tr Σ/|G|² is that
of all gradients of samples there. Adam with betas (0, 0) is the optimizer: it steps by the sign.

    PYTHONPATH=. python benchmarks/surge.py  # writes results/surge.csv, two minutes on one core
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.quickstart import DigitsCNN, digits

ROOT = Path(__file__).parent.parent

DIMENSION, GRADIENT, NOISE, DIAGONAL, SHARED = 1024, 0.02, 1.0, 0.02, 1.0
FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)


def planted_noise_scale() -> float:
    """B_noise of the quadratic, where the signal of a coordinate is far below its noise."""
    trace = DIAGONAL * DIMENSION + SHARED
    shared = SHARED * (DIMENSION - 1)
    return math.pi * NOISE**2 * trace / (2 * GRADIENT**2 * shared)


def sweep_quadratic(global_batch: float, *, draws: int, seed: int) -> float:
    """The best learning rate of one step from 0 at a batch, over a grid refined by a parabola."""
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, DIMENSION)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    gradient = -GRADIENT + NOISE / math.sqrt(global_batch) * noise

    def loss(w: Tensor) -> Tensor:
        total = w.sum(1)
        curved = DIAGONAL * w.square().sum(1) + SHARED / DIMENSION * total.square()
        return (curved / 2 - GRADIENT * total).mean()

    def after(lr: float) -> float:
        w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = torch.optim.Adam([w], lr=lr, betas=(0.0, 0.0), eps=1e-30)
        w.grad = gradient.clone()
        optimizer.step()
        return loss(w.detach()).item()

    return best(after, np.geomspace(1e-4, 1e-1, 25))


def best(after: Callable[[float], float], grid: np.ndarray) -> float:
    """The minimum of a function of the learning rate: of the grid, then of a parabola about it."""
    values = np.array([after(lr) for lr in grid])
    k = int(np.clip(values.argmin(), 1, len(grid) - 2))
    near = slice(k - 1, k + 2)
    a, b, _ = np.polyfit(grid[near], values[near], 2)  # a quadratic loss is one in the rate
    return float(np.clip(-b / (2 * a), grid[k - 1], grid[k + 1])) if a > 0 else float(grid[k])


def law(global_batch: float, noise_scale: float, largest: float) -> float:
    """The surge law, its largest value at the noise scale."""
    ratio = math.sqrt(noise_scale / global_batch)
    return largest / (0.5 * (ratio + 1 / ratio))


def rows_quadratic(draws: int = 400) -> list[dict[str, object]]:
    """One row per batch: the best rate found, and the law's, both relative to that at B_noise."""
    noise = planted_noise_scale()
    found = {f: sweep_quadratic(f * noise, draws=draws, seed=0) for f in FACTORS}
    return [
        row("quadratic", f * noise, noise, found[f] / found[1], law(f, 1, 1.0)) for f in FACTORS
    ]


def row(
    problem: str, global_batch: float, noise: float, found: float, expected: float
) -> dict[str, object]:
    """A line of the table."""
    return {
        "problem": problem,
        "global_batch": round(global_batch, 1),
        "over_noise_scale": round(global_batch / noise, 4),
        "noise_scale": round(noise, 1),
        "best_lr_relative": round(found, 4),
        "surge_law": round(expected, 4),
    }


def digits_point(steps: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The CNN after some steps of Adam, the data, and the gradient of every sample."""
    torch.manual_seed(0)
    x, y = digits()[0].tensors
    net = DigitsCNN().net
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
    values = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, digit: Tensor) -> Tensor:
        scores = torch.func.functional_call(net, parameters, (image[None],))
        return nn.functional.cross_entropy(scores, digit[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x, y)
    return net, x, y, torch.cat([g.flatten(1) for g in each.values()], 1)


def rows_digits(steps: int = 100, draws: int = 48) -> list[dict[str, object]]:
    """One row per batch: the rate with the least mean loss on all data after one signed step."""
    net, x, y, gradients = digits_point(steps)
    mean = gradients.mean(0)
    trace = (gradients - mean).square().sum().item() / (len(x) - 1)
    noise = trace / (mean.square().sum().item() - trace / len(x))
    start = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    grid = np.geomspace(2e-5, 5e-3, 17)

    @torch.no_grad()
    def losses(direction: Tensor) -> np.ndarray:
        found = []
        for lr in grid:
            nn.utils.vector_to_parameters(start - lr * direction, net.parameters())
            found.append(nn.functional.cross_entropy(net(x), y).item())
        return np.array(found)

    def sweep(global_batch: int) -> float:
        generator = torch.Generator().manual_seed(global_batch)
        batches = (
            torch.randint(len(x), (global_batch,), generator=generator) for _ in range(draws)
        )
        values = np.mean([losses(gradients[chosen].mean(0).sign()) for chosen in batches], axis=0)
        return best(lambda lr: float(np.interp(lr, grid, values)), grid)

    batches = [max(1, round(f * noise)) for f in FACTORS]
    found = [sweep(b) for b in batches]
    middle = found[FACTORS.index(1)]
    return [
        row("digits", b, noise, lr / middle, law(b / noise, 1, 1.0))
        for b, lr in zip(batches, found, strict=True)
    ]


def main() -> None:
    """Measure both and write the table."""
    torch.set_num_threads(1)
    rows = [*rows_quadratic(), *rows_digits()]
    with (ROOT / "benchmarks" / "results" / "surge.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for found in rows:
        print(*found.values(), sep="\t")


if __name__ == "__main__":
    main()
