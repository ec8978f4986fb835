"""Steps of the low-rank family: gradients for them, and what the papers make of those."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext import functional

Array = Any
SHAPES = ((9, 6), (6, 9), (8, 2, 2, 2))
EVERY = ("GaLore", "QGaLore", "Fira", "GradNormLoRP", "APOLLO", "APOLLOMini")
BETAS, LR, RANK, GAP = (0.8, 0.9), 0.05, 2, 6


def gradients(steps: int, shapes: Any = SHAPES, dtype: Any = torch.float64) -> list[list[Tensor]]:
    """Of falling singular values, and another subspace at each step."""
    draw = torch.Generator().manual_seed(3)
    return [
        [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
        for _ in range(steps)
    ]


def run(
    optimizer: torch.optim.Optimizer, params: list[Parameter], grads: list[list[Tensor]]
) -> list[Tensor]:
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [x.detach().clone() for x in params]


def parameters(shapes: Any = SHAPES, dtype: Any = torch.float64) -> list[Parameter]:
    draw = torch.Generator().manual_seed(7)
    made = [torch.randn(x, generator=draw, dtype=torch.float64).to(dtype) for x in shapes]
    return [Parameter(x) for x in made]


def by_paper(
    name: str, w: Array, grads: list[Array], index: int, *, weight_decay: float = 0.1
) -> Array:
    """Weights of a matrix after steps, as the papers write them.

    Args:
        name: of the method.
        w: weights.
        grads: of each step.
        index: of the matrix among the parameters: the stream of its random projection.
        weight_decay: decoupled.
    """
    long = max(w.shape)
    rank = 1 if name == "APOLLOMini" else RANK
    m = v = np.zeros((long, rank))
    a = b = np.zeros((len(w), 1))
    basis, gap, left, times = np.zeros(0), GAP, 0, 0
    last: Any = 0.0
    seen: list[float] = []
    for t, g in enumerate(grads, 1):
        bias = np.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        if name == "GradNormLoRP":
            length = np.linalg.norm(w, axis=1, keepdims=True)
            unit = w / length
            by_length = (g * unit).sum(1, keepdims=True)
            g = g * 1.0 - by_length * unit
        if left == 0:
            times += 1
            if name.startswith("APOLLO"):
                how: dict[str, Any] = {
                    "seed": 0,
                    "step": times,
                    "stream": 4 * index,
                    "dtype": torch.float64,
                }
                basis = functional.gaussian_projection(rank, min(w.shape), **how).numpy()
            else:
                u, _, vt = (
                    x.numpy() for x in torch.linalg.svd(torch.tensor(g), full_matrices=False)
                )
                new = vt[:rank] if len(w) >= w.shape[1] else u[:, :rank].T
                if len(basis):  # our signs: those of the last time
                    new = new * np.where((new * basis).sum(1, keepdims=True) < 0, -1, 1)
                if name == "QGaLore" and len(basis):
                    cosine = abs(new[0] @ basis[0]) / np.linalg.norm(basis[0])
                    seen = [*seen, cosine][-5:]
                    gap *= 2 if len(seen) == 5 and np.mean(seen) >= 0.4 else 1
                basis = new
            left = gap
        left -= 1
        tall = g if len(w) >= w.shape[1] else g.T
        r = tall @ basis.T
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r**2
        n = m / (np.sqrt(v) + 1e-6)
        axis = None if name == "APOLLOMini" else 1
        s = np.linalg.norm(n, axis=axis, keepdims=True)
        s = s / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        if name in ("GaLore", "QGaLore", "GradNormLoRP"):
            u = 0.25 * n @ basis
        else:
            rest = s * (tall - r @ basis) if name == "Fira" else s * tall
            size = np.linalg.norm(rest)
            excess = max(size / (last + 1e-8), 1.01) / 1.01 if t > 1 else 1.0
            rest, last = rest / excess, size / excess
            u = n @ basis + rest if name == "Fira" else rest * (128**0.5 if axis is None else 1)
        u = bias * (u if len(w) >= w.shape[1] else u.T)
        decay = LR * weight_decay * w
        if name == "GradNormLoRP":
            a, b = (
                BETAS[0] * a + (1 - BETAS[0]) * by_length,
                BETAS[1] * b + (1 - BETAS[1]) * by_length**2,
            )
            step = a / (1 - BETAS[0] ** t) / (np.sqrt(b / (1 - BETAS[1] ** t)) + 1e-6)
            direction = w - LR * u
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            w = (length - LR * step) * direction - decay
        else:
            w = w - decay - LR * u
    return w
