"""Figures of noise scales and of what is read from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean, stdev

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.geometry_bias import coordinates
from lightning_ext import functional
from lightning_ext.scaling import (
    NormTest,
    Observation,
    fit_critical_batch,
    noise_scale,
    noise_statistics,
    norm_signal,
)

Figures = Iterator[tuple[str, str, float]]
BATCH, PARTS, ETA = 64, 8, 0.5


def batch_rules() -> Figures:
    """First targets of the norm test from random gradients, 20 repeats of 100 batches."""
    for scale in (64, 512, 4096):
        rng = np.random.default_rng(scale)
        noises = [noise_scale(measurements(rng, scale)) for _ in range(20)]
        for name, plug_in in (("plug-in", True), ("unbiased", False)):
            rule, found = NormTest(ETA, plug_in), []
            for noise in noises:
                proposal = rule.propose(Observation(BATCH, 0, noise))
                found.append(BATCH if proposal is None else max(BATCH, proposal.target_batch))
            yield f"first target, {name}, mean", f"B_noise {scale}", mean(found)
            yield f"first target, {name}, deviation", f"B_noise {scale}", stdev(found)
        truth = scale / ETA**2
        within = sum(abs(x / truth - 1) <= 0.05 for x in found)
        yield "unbiased targets within 5 %, of 20", f"B_noise {scale}", within
        above = sum(x > 1.05 * truth for x in found)
        yield "unbiased targets more than 5 % above, of 20", f"B_noise {scale}", above


def measurements(rng: np.random.Generator, scale: int) -> list[tuple[float, float, int]]:
    """Statistics of 100 batches whose gradients have 10,000 coordinates."""
    dim, rows = 10_000, []
    for _ in range(100):
        spread = math.sqrt(scale * PARTS / (BATCH * dim))
        parts = dim**-0.5 + spread * rng.standard_normal((PARTS, dim))
        whole, squares = parts.mean(0), (parts**2).sum(1).tolist()
        row = noise_statistics(squares, [BATCH // PARTS] * PARTS, float(whole @ whole))
        rows.append((float(row[0]), float(row[1]), BATCH))
    return rows


def critical_batch_fit() -> Figures:
    """How often intervals of noisy tables hold what was planted."""
    batches, widths = (4, 8, 16, 32, 64, 128, 256), dict[str, list[float]]()
    for name, exponent, count in (("1", 1, 150), ("free", None, 40)):
        knees, overheads, widths[name] = 0, 0, []
        for seed in range(count):
            errors = np.exp(0.05 * np.random.default_rng(seed).standard_normal(7))
            table = [(b, 100 * (1 + 40 / b) * e) for b, e in zip(batches, errors, strict=True)]
            found = fit_critical_batch(table, exponent=exponent, reference_batch=4)
            knees += found.knee.low <= 40 <= found.knee.high
            overheads += found.overhead.low <= 1.2 * 4 + 8 <= found.overhead.high
            widths[name].append(math.log(found.overhead.high / found.overhead.low))
        yield f"knees inside their interval, of {count}", f"exponent {name}", knees
        yield f"20 % batches inside their interval, of {count}", f"exponent {name}", overheads
    ratio = float(np.median(widths["free"]) / np.median(widths["1"]))
    yield "width of the 20 % interval, log, free over exponent 1", "", ratio


def folds() -> Figures:
    """Errors of three ways to take noise out of an ℓ1 norm, in percent; 60 draws."""
    for kind in ("equal", "gaussian", "laplace", "half zero"):
        for ratio in (1, 4):
            errors = [fold_errors(kind, ratio) for _ in range(60)]
            for name in errors[0]:
                values = [error[name] for error in errors]
                setting = f"{kind}, B/B_noise {ratio}"
                yield f"error in percent, {name}, mean", setting, mean(values)
                yield f"error in percent, {name}, deviation", setting, stdev(values)


def fold_errors(kind: str, ratio: float) -> dict[str, float]:
    """Percent by which each is off, of one draw."""
    x = coordinates(kind)
    x = x * math.sqrt(ratio) * x.numel() / x.abs().sum()
    parts = x + math.sqrt(PARTS) * torch.randn(PARTS, x.numel())
    norms = {n: mean(p.mean(0).abs().sum().item() for p in parts.chunk(n)) for n in (1, 2, 4)}
    whole, samples = [parts[j::4].mean(0) for j in range(4)], [1 / 4] * 4
    found = functional.fold_norms(whole, samples, torch.sign).tolist()
    values = {
        "as it comes out": norms[1],
        "line through halves": 2 * norms[1] - norms[2],
        "nested": (8 * norms[1] - 6 * norms[2] + norms[4]) / 3,
        "in use": float(norm_signal(found[0], found[1:5], found[5:], samples)),
    }
    return {k: 100 * (v / x.abs().sum().item() - 1) for k, v in values.items()}


def coefficients() -> Figures:
    """What Muon's five steps and the six in use make of a nuclear norm."""
    even = torch.diag(torch.linspace(0.05, 1, 200, dtype=torch.float64))
    for name, x in (("even", even), ("Gaussian", torch.randn(96, 384, dtype=torch.float64))):
        truth = torch.linalg.svdvals(x).sum()
        for how, factor in (
            ("Muon's", functional.newton_schulz(x)),
            ("in use", functional.orthogonalize(x)),
        ):
            yield f"nuclear norm off by, {how}", name, ((x * factor).sum() / truth - 1).item()
    values = functional.newton_schulz(even).diagonal()
    yield "least singular value, Muon's", "even", values.min().item()
    yield "largest singular value, Muon's", "even", values.max().item()


def norm_layers() -> Figures:
    """What all parameters have over what norm layers have, while a CNN learns digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    descent = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(13):
        if epoch in (0, 1, 2, 4, 8, 12):
            (sq_norm, trace), (own_sq_norm, own_trace) = statistics(net, x, y)
            noise, own = trace / sq_norm, own_trace / own_sq_norm
            yield "|G|², all over norm layers", f"epoch {epoch}", sq_norm / own_sq_norm
            yield "tr Σ, all over norm layers", f"epoch {epoch}", trace / own_trace
            yield "B_noise, all over norm layers", f"epoch {epoch}", noise / own
            yield "B_noise of all", f"epoch {epoch}", noise
        for rows in torch.randperm(len(x)).split(32):
            descent.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            descent.step()


def statistics(net: nn.Module, x: Tensor, y: Tensor) -> list[tuple[float, float]]:
    """|G|² and tr Σ without bias from every sample's gradient: of all, of norm layers."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    weights = {name: p.detach() for name, p in net.named_parameters()}
    found = vmap(grad(loss), (None, 0, 0), chunk_size=256)(weights, x, y)
    answers, n = [], len(x)
    for names in (list(found), [k for k in found if k.startswith(("1.", "5."))]):
        all_of = torch.cat([found[k].flatten(1) for k in names], 1).double()
        squares, whole = all_of.square().sum().item(), all_of.mean(0).square().sum().item()
        answers.append(((n**2 * whole - squares) / (n * (n - 1)), (squares - n * whole) / (n - 1)))
    return answers


CARDS = {
    "batch_rules": batch_rules,
    "critical_batch_fit": critical_batch_fit,
    "folds": folds,
    "coefficients": coefficients,
    "norm_layers": norm_layers,
}
