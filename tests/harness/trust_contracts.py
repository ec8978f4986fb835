"""What the contract of `functional` asks of LAMB, LARS, AdamP and CAME.

Each entry: gradcheck, a value worked by hand, an invariance, the paper's pseudo-code in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import FactoredState, clip_coefficient, radial_part

Array = Any
Four = tuple[Callable[[], bool], Callable[[], tuple], Callable[[], tuple], Callable[[], tuple]]

SHAPES: list[tuple[int, ...]] = [(3, 4), (2, 1, 3), (4, 2)]
SQUARES: list[tuple[int, ...]] = [(5, 4)] * 3
STEPS = 25
LR, B1, B2, B3 = 0.1, 0.8, 0.9, 0.95
SETTINGS: dict[str, dict[str, Any]] = {
    "lamb": {"lr": LR, "betas": (B1, B2), "eps": 0.0, "weight_decay": 0.5},
    "lars": {"lr": LR, "momentum": 0.5, "weight_decay": 0.5, "trust_coefficient": 0.25},
    "adamp": {"lr": LR, "betas": (B1, B2), "eps": 0.0, "weight_decay": 0.5, "delta": 0.9},
    "came": {"lr": LR, "betas": (B1, B2, B3), "eps": (1e-8, 1e-6), "weight_decay": 0.5},
    "came_vector": {"lr": LR, "betas": (B1, B2, B3), "eps": (1e-8, 0.0), "weight_decay": 0.5},
}


def _normal(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _factors(shape: tuple[int, ...], like: Callable[..., Tensor] = torch.zeros) -> FactoredState:
    lengths = [shape[0], torch.Size(shape[1:]).numel()] * 2
    return FactoredState(*(like(n, dtype=torch.float64) for n in lengths))


def _zeros(kind: str, shape: tuple[int, ...]) -> list[Any]:
    """States before the first step."""
    zero = torch.zeros(shape, dtype=torch.float64)
    if kind == "lars":
        return [zero]
    return [zero, _factors(shape) if kind == "came" else zero.clone()]


def _midway(kind: str, shape: tuple[int, ...]) -> list[Any]:
    """States of a run under way."""
    mean = torch.randn(shape, dtype=torch.float64)
    if kind == "lars":
        return [mean]
    if kind == "came":
        return [mean, FactoredState(*(x + 0.1 for x in _factors(shape, torch.rand)))]
    return [mean, torch.rand(shape, dtype=torch.float64) + 0.1]


def _counts(kind: str, t: float) -> list[Any]:
    return [torch.tensor(float(t))] if kind in ("lamb", "adamp") else []


def _flat(found: Sequence[Any]) -> Tensor:
    parts = [y for x in found for y in (x if isinstance(x, FactoredState) else [x])]
    return torch.cat([x.detach().flatten() for x in parts])


def _one(kind: str, *row: Any, **settings: Any) -> tuple[Any, ...]:
    update: Callable[..., tuple[Any, ...]] = getattr(functional, f"{kind}_update")
    return update(*row, **(SETTINGS[kind] | settings))


def _all(kind: str, rows: Sequence[Sequence[Any]], **settings: Any) -> Tensor:
    """Update copies in place; return parameters and states."""
    update = getattr(functional, f"{kind}_update_")
    copies = [[_copy(x) for x in row] for row in rows]
    update(*(list(column) for column in zip(*copies, strict=True)), **(SETTINGS[kind] | settings))
    end = -1 if _counts(kind, 0) else None
    return torch.cat([_flat([row[0], *row[2:end]]) for row in copies])


def _copy(x: Any) -> Any:
    return FactoredState(*(y.clone() for y in x)) if isinstance(x, FactoredState) else x.clone()


def _row(kind: str, shape: tuple[int, ...] = (3, 4), t: float = 2) -> list[Any]:
    return [*_normal([shape, shape]), *_midway(kind, shape), *_counts(kind, t)]


def _gradient(kind: str) -> bool:
    weight, grad, *others = _row(kind)
    return torch.autograd.gradcheck(
        lambda w, g: _one(kind, w, g, *others)[0], (weight.requires_grad_(), grad.requires_grad_())
    )


def _records_nothing(kind: str) -> bool:
    rows = [_row(kind, shape) for shape in SHAPES]
    for row in rows:
        row[0].requires_grad_()
    columns = [list(column) for column in zip(*rows, strict=True)]
    getattr(functional, f"{kind}_update_")(*columns, **SETTINGS[kind])
    return all(x.is_leaf and x.requires_grad for x in columns[0])


_TWO = [[2.0, 2.0], [2.0, 2.0]]
BY_HAND: dict[str, tuple[list[Any], dict[str, Any], list[float]]] = {
    # u = (1/(1 + 1), 0), ‖x‖/‖u‖ = 5/0.5.
    "lamb": ([[3, 4], [1, 0]], {"eps": 1.0, "weight_decay": 0.0}, [2.5, 4, 0.2, 0, 0.1, 0]),
    # τ = 0.25 · 5/100.
    "lars": ([[3, 4], [0, 100]], {"weight_decay": 0.0}, [3, 3.875, 0, 1.25]),
    # p = (-1, 1), less w · p·w/25.
    "adamp": (
        [[[3, 4]], [[-4, 3]]],
        {"weight_decay": 0.0},
        [3.112, 3.916, -0.8, 0.6, 1.6, 0.9],
    ),
    # V = 1 and û = 2, clipped to 1; m = 1/2; S = 1/16.
    "came": (
        [[[1.0, 1.0], [1.0, 1.0]], _TWO],
        {"eps": (0.0, 0.0), "betas": (0.5, 0.75, 0.75), "weight_decay": 0.0},
        [0.8] * 4 + [0.5] * 4 + [1.0] * 4 + [0.0625] * 4,
    ),
    # v = g²/4 and û = ±2, clipped to ±1.
    "came_vector": (
        [[0.0, 0.0], [3.0, -5.0]],
        {"lr": 1.0, "eps": (0.0, 0.0), "betas": (0.5, 0.75, 0.9)},
        [-0.5, 0.5, 0.5, -0.5, 2.25, 6.25],
    ),
}


def _by_hand(kind: str, *, in_place: bool) -> tuple[Tensor, list[float]]:
    inputs, settings, expected = BY_HAND[kind]
    weight, grad = (torch.tensor(x, dtype=torch.float64) for x in inputs)
    row = [weight, grad, *_zeros(kind, tuple(weight.shape)), *_counts(kind, 1)]
    found = _all(kind, [row], **settings) if in_place else _flat(_one(kind, *row, **settings))
    return found.mul(1e9).round() / 1e9 + 0.0, expected


def _scaled(kind: str) -> tuple[Tensor, Tensor]:
    """Gradients eight times as large, with moments to match, move the weights as far."""
    weight, grad, mean, *others = _row(kind)
    scaled: list[Any] = [weight, 8 * grad, 8 * mean, *others]
    settings: dict[str, Any] = {"eps": (0.0, 1e-6)} if "came" in kind else {}
    if kind == "lars":
        # Not with the decay in its norm, and v has no scale of the gradient's.
        scaled, settings = [weight, 8 * grad, mean], {"weight_decay": 0.0}
    elif kind == "came":
        state = others[0]
        scaled[2:4] = [mean, FactoredState(64 * state.sq_row, 64 * state.sq_col, *state[2:])]
    elif kind == "came_vector":
        scaled[2:4] = [mean, 64 * others[0]]
    else:
        scaled[3] = 64 * others[0]
    first, second = (
        _one(kind, *row, **settings)[0] for row in ([weight, grad, mean, *others], scaled)
    )
    return second, first


def _one_by_one(kind: str) -> tuple[Tensor, Tensor]:
    rows = [_row(kind, shape, t) for t, shape in enumerate(SHAPES, 1)]
    return torch.cat([_all(kind, [row]) for row in rows]), _all(kind, rows)


def _lamb_in_numpy(w: Array, grads: Sequence[Array]) -> Array:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * g * g
        u = (m / (1 - B1**t)) / np.sqrt(v / (1 - B2**t)) + 0.5 * w
        w = w - LR * np.linalg.norm(w) / np.linalg.norm(u) * u
    return w


def _lars_in_numpy(w: Array, grads: Sequence[Array]) -> Array:
    v = np.zeros_like(w)
    for g in grads:
        # The paper's form; at one rate the other one is the same.
        local = 0.25 * np.linalg.norm(w) / (np.linalg.norm(g) + 0.5 * np.linalg.norm(w))
        v = 0.5 * v + LR * local * (g + 0.5 * w)
        w = w - v
    return w


def _adamp_in_numpy(w: Array, grads: Sequence[Array]) -> Array:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * g * g
        p = (m / (1 - B1**t)) / np.sqrt(v / (1 - B2**t))
        decay = 0.5
        for view in ((len(w), -1), (1, -1)):
            a, b, c = (x.reshape(view) for x in (w, g, p))
            pairs = zip(a, b, strict=True)
            cosine = [abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
            if max(cosine) < 0.9 / np.sqrt(a.shape[1]):
                units = a / np.linalg.norm(a, axis=1, keepdims=True)
                p = (c - units * (units * c).sum(1, keepdims=True)).reshape(w.shape)
                decay *= 0.1
                break
        w = w - LR * decay * w - LR * p
    return w


def _came_in_numpy(w: Array, grads: Sequence[Array]) -> Array:
    shape, w = w.shape, w.reshape(len(w), -1)
    m = np.zeros_like(w)
    means = [np.zeros(n) for n in w.shape * 2]
    for g in grads:
        squares = g.reshape(w.shape) ** 2 + 1e-8
        means[0] = B2 * means[0] + (1 - B2) * squares.mean(1)
        means[1] = B2 * means[1] + (1 - B2) * squares.mean(0)
        u = g.reshape(w.shape) / np.sqrt(np.outer(means[0], means[1]) / means[0].mean())
        u = u / max(1.0, np.sqrt((u * u).mean()))
        m = B1 * m + (1 - B1) * u
        squares = (u - m) ** 2 + 1e-6
        means[2] = B3 * means[2] + (1 - B3) * squares.mean(1)
        means[3] = B3 * means[3] + (1 - B3) * squares.mean(0)
        trusted = m / np.sqrt(np.outer(means[2], means[3]) / means[2].mean())
        w = w - LR * (trusted + 0.5 * w)
    return w.reshape(shape)


def _came_vector_in_numpy(w: Array, grads: Sequence[Array]) -> Array:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for g in grads:
        v = B2 * v + (1 - B2) * (g * g + 1e-8)
        u = g / np.sqrt(v)
        m = B1 * m + (1 - B1) * u / max(1.0, np.sqrt((u * u).mean()))
        w = w - LR * (m + 0.5 * w)
    return w


IN_NUMPY = {
    "lamb": _lamb_in_numpy,
    "lars": _lars_in_numpy,
    "adamp": _adamp_in_numpy,
    "came": _came_in_numpy,
    "came_vector": _came_vector_in_numpy,
}


def _in_numpy(kind: str, weights: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> Tensor:
    found = []
    for i, weight in enumerate(weights):
        steps = [step[i].numpy() for step in grads]
        found.append(torch.from_numpy(IN_NUMPY[kind](weight.numpy(), steps)))
    return _flat(found)


def _pseudo_code(kind: str) -> tuple[Tensor, Tensor]:
    weights, grads = _normal(), [_normal() for _ in range(STEPS)]
    after = []
    for i, weight in enumerate(weights):
        states = _zeros(kind, tuple(weight.shape))
        for t, step in enumerate(grads, 1):
            weight, *states = _one(kind, weight, step[i], *states, *_counts(kind, t))
        after.append(weight)
    return _flat(after), _in_numpy(kind, weights, grads)


def _pseudo_code_in_place(kind: str) -> tuple[Tensor, Tensor]:
    weights, grads = _normal(), [_normal() for _ in range(STEPS)]
    after = [x.clone() for x in weights]
    states = [list(x) for x in zip(*(_zeros(kind, tuple(w.shape)) for w in weights), strict=True)]
    update = getattr(functional, f"{kind}_update_")
    for t, step in enumerate(grads, 1):
        counts = [[x for _ in weights] for x in _counts(kind, t)]
        update(after, step, *states, *counts, **SETTINGS[kind])
    return _flat(after), _in_numpy(kind, weights, grads)


def _share(w: Tensor, g: Tensor, p: Tensor, delta: float = 2.0) -> Tensor:
    return radial_part(w, g, p, delta=delta)[0]


def _by_hand_share() -> tuple[Tensor, list[list[float]]]:
    # The second row is along its gradient, the whole is orthogonal to it.
    w, g = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    return _share(w, g, torch.ones(2, 2), delta=0.1), [[0.5], [0.5]]  # (2 + 2)/(4 + 4)


def _orthogonal_share() -> tuple[Tensor, Tensor]:
    """What is left of an update does not change, to first order, the norm of any row."""
    w, g, p = _normal(SQUARES)
    return ((p - _share(w, g, p) * w) * w).sum(1), torch.zeros(5, dtype=torch.float64)


def _cosine_share() -> tuple[Tensor, Tensor]:
    w, g, p = _normal(SQUARES)
    projection = torch.nn.functional.cosine_similarity(p, w) * p.norm(dim=1) / w.norm(dim=1)
    return _share(w, g, p), projection[:, None]


def _through_factors() -> bool:
    weight, grad, mean, state = _row("came")
    inputs = tuple(x.requires_grad_() for x in state)
    return torch.autograd.gradcheck(
        lambda *x: _one("came", weight, grad, mean, FactoredState(*x))[0], inputs
    )


def _factors_by_hand() -> tuple[Tensor, list[float]]:
    inputs, settings, expected = BY_HAND["came"]
    weight, grad = (torch.tensor(x, dtype=torch.float64) for x in inputs)
    return _flat(_one("came", weight, grad, *_zeros("came", (2, 2)), **settings)[2]), expected[8:]


def _transposed_factors() -> tuple[Tensor, Tensor]:
    """Rows and columns are alike in means of squares."""
    weight, grad, mean, _ = _row("came", (4, 4))
    one = _one("came", weight, grad, mean, _factors((4, 4)))[2]
    other = _one("came", weight.T, grad.T, mean.T, _factors((4, 4)))[2]
    return torch.cat([one.sq_row, one.sq_col]), torch.cat([other.sq_col, other.sq_row])


def _numpy_factors() -> tuple[Tensor, Array]:
    weight, grad, mean, state = _row("came")
    found = _one("came", weight, grad, mean, state)[2]
    squares = grad.numpy() ** 2 + 1e-8
    expected = B2 * state.sq_row.numpy() + (1 - B2) * squares.mean(1)
    return found.sq_row, expected


def _clip_of_norms() -> bool:
    x = torch.tensor([0.25, 4.0, 9.0], dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(lambda y: clip_coefficient(y, 1.0), x)


def _torch_clip() -> tuple[Tensor, Tensor]:
    weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    grad = torch.randn(3, 4, dtype=torch.float64)
    weight.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([weight], 0.5)
    return grad * clip_coefficient(grad.square().sum(), 0.5), weight.grad


TRUST_CONTRACTS: dict[str, Four] = {
    "FactoredState": (_through_factors, _factors_by_hand, _transposed_factors, _numpy_factors),
    "clip_coefficient": (
        _clip_of_norms,
        lambda: (clip_coefficient(torch.tensor([0.0, 4.0, 64.0]), 4.0), [1, 1, 0.5]),
        lambda: (
            clip_coefficient(torch.tensor(5.0), 1.0),
            clip_coefficient(torch.tensor(20.0), 2.0),
        ),
        _torch_clip,
    ),
    "radial_part": (
        lambda: torch.autograd.gradcheck(_share, [x.requires_grad_() for x in _normal(SQUARES)]),
        _by_hand_share,
        _orthogonal_share,
        _cosine_share,
    ),
    **{
        f"{kind}_update": (
            partial(_gradient, kind),
            partial(_by_hand, kind, in_place=False),
            partial(_scaled, kind),
            partial(_pseudo_code, kind),
        )
        for kind in SETTINGS
    },
    **{
        f"{kind}_update_": (
            partial(_records_nothing, kind),
            partial(_by_hand, kind, in_place=True),
            partial(_one_by_one, kind),
            partial(_pseudo_code_in_place, kind),
        )
        for kind in SETTINGS
    },
}
