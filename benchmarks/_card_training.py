"""Figures of small trainings: seconds each, in float64 unless they say otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_ext import functional, optim, scaling

Figures = Iterator[tuple[str, str, float]]
Make = Callable[[nn.Module], torch.optim.Optimizer]


def float64(*values: float, times: int = 1) -> Tensor:
    """These numbers, so many times over."""
    return torch.tensor(values, dtype=torch.float64).repeat(times)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images from -1 to 1, and labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1).float(), torch.tensor(labels)


def vrgd() -> Figures:
    """Cosine of a step with the true gradient, without and with scaling; means of 50 draws."""
    even, half = float64(1.0, times=1000), float64(1.0, 0.0, times=500)
    cases = {
        "noise 0.3 and 10": (even, float64(0.3, 10, times=500), (8, 4)),
        "gradients 1 and 0, noise 3": (half, 3 * even, (8, 4)),
        "noise 0.3 and 3": (even, float64(0.3, 3, times=500), (32,)),
    }
    for name, (truth, noise, counts) in cases.items():
        for parts in counts:
            for how, gamma in (("without", 1.0), ("with", 0.1)):
                found = mean(cosine(truth, noise, parts, gamma) for _ in range(50))
                yield f"cosine, {how}", f"{name}, {parts} parts", found


def cosine(truth: Tensor, noise: Tensor, parts: int, gamma: float) -> float:
    """Of one step of SGD with the true gradient."""
    w = nn.Parameter(torch.zeros_like(truth))
    optimizer = optim.VRGD(torch.optim.SGD([w], lr=1.0), gamma=gamma)
    for _ in range(parts):
        (w * (truth + noise * torch.randn_like(truth)) / parts).sum().backward()
    optimizer.step()
    return float(-(w.detach() @ truth) / (w.detach().norm() * truth.norm()))


def egn() -> Figures:
    """Last loss of a net 1-16-1 that learns sin 6x from 150 batches of 16."""
    rates = {"SGD": (0.01, 0.03, 0.1, 0.3, 1.0), "Adam": (0.003, 0.01, 0.03, 0.1)}
    for seed in range(5):
        exact = wave(partial(of_module, optim.EGN, lr=0.3, loss="mse", damping=1e-3), seed)
        yield "loss, EGN", f"seed {seed}", exact
        sgd = [
            wave(partial(of_module, torch.optim.SGD, lr=lr, momentum=0.9), seed)
            for lr in rates["SGD"]
        ]
        adam = [wave(partial(of_module, torch.optim.Adam, lr=lr), seed) for lr in rates["Adam"]]
        yield "loss, SGD at its best of 5 rates", f"seed {seed}", min(sgd)
        yield "loss, Adam at its best of 4 rates", f"seed {seed}", min(adam)


def of_module(kind: Callable[..., Any], module: nn.Module, **how: Any) -> Any:
    """An optimizer of a module."""
    return kind(module.parameters(), **how)


def wave(make: Callable[..., Any], seed: int) -> float:
    """Half the mean squared error over the range at the end."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer, draw = make(module), torch.Generator().manual_seed(seed + 1)
    for _ in range(150):
        x = 2 * torch.rand(16, 1, generator=draw, dtype=torch.float64) - 1
        if isinstance(optimizer, optim.EGN):
            optimizer.step(partial(outputs, module, x))
            continue
        optimizer.zero_grad()
        (nn.functional.mse_loss(module(x), torch.sin(6 * x)) / 2).backward()
        optimizer.step()
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    return float((module(x) - torch.sin(6 * x)).detach().square().mean()) / 2


def outputs(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a net says, and what it is to learn."""
    return module(x), torch.sin(6 * x)


def mkor() -> Figures:
    """Steps of a regression whose inputs have a mean of 3, to 1e-4 of its first loss."""
    forms: dict[str, tuple[Make, int]] = {
        "SGD": (lambda m: torch.optim.SGD(m.parameters(), lr=1.0), 10_000),
        "MKOR": (lambda m: optim.MKOR(torch.optim.SGD(m.parameters(), lr=1.0), m), 2000),
        "MKOR, average": (
            lambda m: optim.MKOR(torch.optim.SGD(m.parameters(), lr=1.0), m, form="average"),
            2000,
        ),
    }
    for name, (make, most) in forms.items():
        found = min(steps_to_solve(make, 2.0**-k, most) for k in range(-1, 10))
        yield f"least steps over rates of powers of 2, {name}", f"at most {most}", found


def steps_to_solve(make: Make, lr: float, most: int) -> int:
    """Steps until the loss is there; the most where it never is, or grows."""
    torch.manual_seed(0)
    x = torch.randn(256, 8, dtype=torch.float64) + 3.0
    y = x @ torch.randn(8, 1, dtype=torch.float64) + 2.0
    module = nn.Linear(8, 1).double()
    optimizer, first = make(module), 0.0
    optimizer.param_groups[0]["lr"] = lr
    for step in range(most):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        first = first or loss.item()
        if loss.item() < 1e-4 * first:
            return step
        if not loss.item() < 1e3 * first:
            return most
        loss.backward()
        optimizer.step()
    return most


def mt_adamw() -> Figures:
    """How far a weight goes whose task is drawn 1 : 3, over another one's; 1000 steps."""
    how: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0}
    tasks = {"rare": (0.25, 1.0), "often": (0.75, 1.0)}
    for seed in range(5):
        for name in ("MTAdamW", "AdamW"):
            weight, draw = nn.Parameter(torch.zeros(2)), torch.Generator().manual_seed(seed)
            ours = optim.MTAdamW([weight], tasks=tasks, **how)
            optimizer = ours if name == "MTAdamW" else torch.optim.AdamW([weight], **how)
            for _ in range(1000):
                rare = bool(torch.rand((), generator=draw) < 0.25)
                weight.grad = torch.tensor([-1000.0, 0.0] if rare else [0.0, -1.0])
                ours.set_task("rare" if rare else "often")
                optimizer.step()
            yield f"ratio, {name}", f"seed {seed}", float(weight.detach()[0] / weight.detach()[1])


def diagnostics() -> Figures:
    """Adam on gradients that remember the last one; the way of a net from its first weights."""
    for rho in (0.0, 0.5, 0.9, 0.99, 0.999):
        grad = torch.randn(20_000, dtype=torch.float64)
        weight = nn.Parameter(torch.zeros_like(grad))
        adam = torch.optim.Adam([weight], betas=(0.9, 0.999))
        for _ in range(400):
            grad = rho * grad + math.sqrt(1 - rho**2) * torch.randn_like(grad)
            weight.grad = grad.clone()
            adam.step()
        state = adam.state[weight]
        step: dict[str, Any] = {"step": 400, "betas": (0.9, 0.999), "eps": 1e-8}
        sums = functional.adam_instability_sums(grad, state["exp_avg"], state["exp_avg_sq"], **step)
        found = scaling.adam_instability(sums.tolist(), eps=1e-8)
        yield "share of |u| above 0.9", f"rho {rho}", found.extreme
        yield "root mean square of u", f"rho {rho}", found.update_rms
    for batch, lr, seed in (
        (32, 0.1, 0),
        (32, 0.1, 1),
        (512, 0.1, 0),
        (512, 0.4, 0),
        (512, 1.6, 0),
    ):
        yield from ((x, f"batch {batch}, lr {lr}, seed {seed}", y) for x, y in way(batch, lr, seed))


def way(batch: int, lr: float, seed: int) -> Iterator[tuple[str, float]]:
    """Distances of a 64-128-10 net from its first weights over 1000 steps of SGD on digits."""
    torch.manual_seed(seed)
    x, y = digits()
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    first = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    descent, found = torch.optim.SGD(net.parameters(), lr=lr), {}
    for step in range(1, 1001):
        rows = torch.randint(len(x), (batch,))
        descent.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        descent.step()
        if step % 10 == 0:
            now = nn.utils.parameters_to_vector(net.parameters()).detach()
            found[step] = (now - first).norm().item()
    yield from ((f"distance after {at} steps", found[at]) for at in (10, 100, 1000))
    steps, distances = np.array(list(found)), np.array(list(found.values()))
    yield "slope over log t", float(np.polyfit(np.log(steps), distances, 1)[0])
    for name, axis in (("log t", np.log(steps)), ("root of t", np.sqrt(steps))):
        yield f"r² over {name}", float(np.corrcoef(axis, distances)[0, 1] ** 2)


def refined_schedule() -> Figures:
    """Final training loss of logistic regression on digits, each schedule at its best rate."""
    for noise in (0.0, 0.2):
        for name, rates in (("SGD", (0.03, 0.1, 0.3)), ("Adam", (0.001, 0.003, 0.01))):
            norm = "l2" if name == "SGD" else "l1"
            plain: dict[str, Callable[[int], float]] = {
                "constant": lambda s: 1.0,
                "cosine": lambda s: scaling.cosine_factor(s, total_samples=1000),
                "line": lambda s: 1 - s / 1000,
            }
            setting = f"{name}, {noise:.0%} of labels random"
            found = {k: best(name, rates, f, noise) for k, f in plain.items()}
            for k, (loss, _) in found.items():
                yield f"loss, {k}", setting, loss
            norms = regression(name, found["constant"][1], plain["constant"], noise, 0)[1]
            table = scaling.refined_factors(norms[norm], norm=norm)
            loss, _ = best(name, rates, partial(list.__getitem__, table), noise)
            yield "loss, refined", setting, loss


def best(
    name: str, rates: tuple[float, ...], factor: Callable[[int], float], noise: float
) -> tuple[float, float]:
    """The least mean loss of three seeds over rates, and its rate."""
    return min(
        (mean(regression(name, lr, factor, noise, 10 + seed)[0] for seed in range(3)), lr)
        for lr in rates
    )


def regression(
    name: str, lr: float, factor: Callable[[int], float], noise: float, seed: int
) -> tuple[float, dict[str, list[float]]]:
    """Loss over all images after 1000 steps of 16, and the norms of gradients on the way."""
    x, y = digits()
    fixed = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=fixed) < noise
    y = torch.where(wrong, torch.randint(10, y.shape, generator=fixed), y)
    torch.manual_seed(seed)
    net = nn.Linear(64, 10)
    kind = torch.optim.SGD if name == "SGD" else torch.optim.Adam
    optimizer, norms = kind(net.parameters(), lr=lr), {"l1": [0.0] * 0, "l2": [0.0] * 0}
    for step in range(1000):
        rows = torch.randint(len(x), (16,))
        optimizer.param_groups[0]["lr"] = lr * factor(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        grads = nn.utils.parameters_to_vector(
            [p.grad for p in net.parameters() if p.grad is not None]
        )
        norms["l1"].append(grads.abs().sum().item())
        norms["l2"].append(grads.norm().item())
        optimizer.step()
    return nn.functional.cross_entropy(net(x), y).item(), norms


CARDS = {
    "vrgd": vrgd,
    "egn": egn,
    "mkor": mkor,
    "mt_adamw": mt_adamw,
    "diagnostics": diagnostics,
    "refined_schedule": refined_schedule,
}
