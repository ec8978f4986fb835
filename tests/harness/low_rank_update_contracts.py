"""What the contract of `functional` asks of updates of low rank.

Each entry: gradcheck, a value worked by hand, an invariance, an independent version in numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ext import functional

Array = Any
Four = tuple[Callable[[], bool], Callable[[], tuple], Callable[[], tuple], Callable[[], tuple]]
RANK = 3


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def new_basis(short: int = 5, rank: int = RANK) -> Tensor:
    return torch.linalg.qr(normal(short, rank))[0].T.contiguous()


# low_rank_scales, limit_norm_growth


def _gradcheck_scales() -> bool:
    pair = normal(4, RANK).requires_grad_(), normal(4, RANK).requires_grad_()
    return all(
        torch.autograd.gradcheck(lambda x, y, p=per: functional.low_rank_scales(x, y, per=p), pair)
        for per in ("channel", "tensor")
    )


def _hand_scales() -> tuple[Tensor, list[Any]]:
    direction, low = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    return functional.low_rank_scales(direction, low), [[2.5], [0.0]]


def _turned_scales() -> tuple[Tensor, Tensor]:
    direction, low, turn = normal(4, RANK), normal(4, RANK), torch.linalg.qr(normal(3, 3))[0]
    scales = functional.low_rank_scales
    return scales(direction @ turn, low @ turn), scales(direction, low)


def _numpy_scales() -> tuple[Tensor, Array]:
    direction, low = normal(4, RANK), normal(4, RANK)
    truth = np.linalg.norm(direction.numpy()) / np.linalg.norm(low.numpy())
    return functional.low_rank_scales(direction, low, per="tensor"), [[truth]]


def _gradcheck_limit() -> bool:
    previous = torch.tensor(0.5).double()
    update = normal(4, 3).requires_grad_()
    return torch.autograd.gradcheck(lambda x: functional.limit_norm_growth(x, previous), (update,))


def _hand_limit() -> tuple[Tensor, list[float]]:
    update = torch.tensor([3.0, 4.0])
    found = [
        functional.limit_norm_growth(update, torch.tensor(n), gamma=2.0) for n in (0.0, 1.0, 9.0)
    ]
    return torch.cat([x.view(-1) for pair in found for x in pair]).mul(5).round(), [
        *(15, 20, 25),
        *(6, 8, 10),
        *(15, 20, 25),
    ]


def _turned_limit() -> tuple[Tensor, Tensor]:
    update, previous = normal(6), torch.tensor(0.5).double()
    turn = torch.linalg.qr(normal(6, 6))[0]
    limit = functional.limit_norm_growth
    return limit(turn @ update, previous)[0], turn @ limit(update, previous)[0]


def _numpy_limit() -> tuple[Tensor, Array]:
    norm: Tensor = torch.tensor(0.0).double()
    truth: Any = 0.0
    found, truths = [], []
    for step in range(6):
        update = normal(5) * 2**step
        new, norm = functional.limit_norm_growth(update, norm)
        size: Any = np.linalg.norm(update.numpy())
        excess = max(size / (truth + 1e-8), 1.01) / 1.01 if step else 1.0
        found.append(new)
        truths.append(update.numpy() / excess)
        truth = size / excess
    return torch.stack(found), np.stack(truths)


# low_rank_update

FORMS: list[dict[str, Any]] = [
    {"form": "galore", "scale": 0.25},
    {"form": "fira", "scale": 0.5},
    {"form": "fira", "scale": 0.25, "alpha_in_residual": True},
    {"form": "apollo", "scale": 4.0},
    {"form": "apollo", "scale": 4.0, "per": "tensor", "scale_front": True},
]


def update_in_numpy(
    grads: list[Array],
    basis: Array,
    *,
    form: str,
    scale: float,
    per: str = "channel",
    alpha_in_residual: bool = False,
    scale_front: bool = False,
) -> list[Array]:
    """Updates of steps in one subspace.

    Args:
        grads: of each step, all with at least as many rows as columns.
        basis: of the subspace.
        form: "galore", "fira" or "apollo".
        scale: of the update.
        per: of APOLLO's scales.
        alpha_in_residual: as Fira's authors have it.
        scale_front: as APOLLO's authors call it.
    """
    m = v = np.zeros((len(grads[0]), len(basis)))
    last: Any = 0.0
    found = []
    for t, g in enumerate(grads, 1):
        r = g @ basis.T
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        n = m / (np.sqrt(v) + 1e-6)
        axis = 1 if per == "channel" else None
        s = np.linalg.norm(n, axis=axis, keepdims=True)
        s = s / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        if form == "galore":
            u = scale * n @ basis
        else:
            rest = s * g
            if form == "fira":
                rest = s * (g - (scale if alpha_in_residual else 1.0) * r @ basis)
            elif scale_front:
                rest = rest * np.sqrt(scale)
            size: Any = np.linalg.norm(rest)
            if t > 1:
                excess = max(size / (last + 1e-8), 1.01) / 1.01
                rest, size = rest / excess, size / excess
            last = size
            u = scale * n @ basis + rest
            if form == "apollo":
                u = rest if scale_front else rest * np.sqrt(scale)
        found.append(u * np.sqrt(1 - 0.999**t) / (1 - 0.9**t))
    return found


def _updates(grads: list[Tensor], basis: Tensor, **how: Any) -> list[Tensor]:
    long = max(grads[0].shape)
    mean = square = torch.zeros(long, len(basis), dtype=torch.float64)
    norm: Tensor | None = torch.tensor(0.0).double()
    found = []
    for t, grad in enumerate(grads, 1):
        update, mean, square, norm = functional.low_rank_update(
            grad, basis, mean, square, t, norm, **how
        )
        found.append(update)
    return found


def _gradcheck_update() -> bool:
    basis, mean, square = new_basis(), normal(7, RANK), normal(7, RANK).square()
    norm, grad = torch.tensor(0.1).double(), normal(7, 5).requires_grad_()
    return all(
        torch.autograd.gradcheck(
            lambda x, how=how: functional.low_rank_update(x, basis, mean, square, 3, norm, **how)[
                0
            ],
            (grad,),
        )
        for how in FORMS
    )


def _hand_update() -> tuple[Tensor, list[Any]]:
    # The first step of Adam is the sign: N·√(1 − β₂)/(1 − β₁) = ±1 in the first column.
    grad, basis = torch.tensor([[3.0, 7.0], [-4.0, 1.0], [8.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    found = _updates([grad.double()], basis.double(), form="galore", scale=0.5, eps=0.0)[0]
    return found.round(decimals=9), [[0.5, 0], [-0.5, 0], [0.5, 0]]


def _transposed_update() -> tuple[Tensor, Tensor]:
    grads, basis = [normal(7, 5) for _ in range(4)], new_basis()
    found, turned = [], []
    for how in FORMS:
        found += _updates(grads, basis, **how)
        turned += [x.T for x in _updates([x.T for x in grads], basis, **how)]
    return torch.stack(turned), torch.stack(found)


def _numpy_update() -> tuple[Tensor, Array]:
    grads, basis = [normal(7, 5) * 1.5**t for t in range(6)], new_basis()
    arrays = [x.numpy() for x in grads]
    found = [x for how in FORMS for x in _updates(grads, basis, **how)]
    truth = [x for how in FORMS for x in update_in_numpy(arrays, basis.numpy(), **how)]
    return torch.stack(found), np.stack(truth)


# weight_norm_gradients, weight_norm_step


def _gradcheck_norms() -> bool:
    pair = normal(4, 3).requires_grad_(), normal(4, 3).requires_grad_()
    return torch.autograd.gradcheck(functional.weight_norm_gradients, pair)


def _hand_norms() -> tuple[Tensor, list[Any]]:
    weight, grad = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 5.0], [1.0, 2.0]])
    return torch.cat(functional.weight_norm_gradients(weight, grad), 1), [[0, 5, 3], [1, 2, 0]]


def _radial_norms() -> tuple[Tensor, Tensor]:
    weight, grad = normal(4, 3), normal(4, 3)
    found = functional.weight_norm_gradients(weight, grad)[0]
    return (found * weight).sum(1), torch.zeros(4, dtype=torch.float64)


def _autograd_norms() -> tuple[Tensor, Tensor]:
    weight, grad = normal(4, 3), normal(4, 3)
    v, g = weight.clone().requires_grad_(), weight.norm(dim=1, keepdim=True).requires_grad_()
    (grad * (g * v / v.norm(dim=1, keepdim=True))).sum().backward()
    assert v.grad is not None
    assert g.grad is not None
    found = functional.weight_norm_gradients(weight, grad)
    return torch.cat(found, 1), torch.cat([v.grad, g.grad], 1)


def _gradcheck_norm_step() -> bool:
    three = normal(4, 3), normal(4, 3), normal(4, 1)
    return torch.autograd.gradcheck(
        functional.weight_norm_step, tuple(x.requires_grad_() for x in three)
    )


def _hand_norm_step() -> tuple[Tensor, list[Any]]:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    step, length = torch.tensor([[3.0, 0.0], [1.0, -2.0]]), torch.tensor([[3.0], [7.0]])
    return functional.weight_norm_step(weight, step, length), [[0, 2], [-1, 2]]


def _lengths_of_norm_step() -> tuple[Tensor, Tensor]:
    weight, step, length = normal(4, 3), normal(4, 3), normal(4, 1).abs() / 9
    found = functional.weight_norm_step(weight, step, length)
    return found.norm(dim=1, keepdim=True), weight.norm(dim=1, keepdim=True) - length


def _numpy_norm_step() -> tuple[Tensor, Array]:
    weight, step, length = normal(4, 3), normal(4, 3), normal(4, 1)
    found = functional.weight_norm_step(weight, step, length)
    w, d, g = (x.numpy() for x in (weight, step, length))
    truth = [
        (np.sqrt(a @ a) - c[0]) * (a - b) / np.sqrt((a - b) @ (a - b))
        for a, b, c in zip(w, d, g, strict=True)
    ]
    return found, np.stack(truth)


UPDATE_CONTRACTS: dict[str, Four] = {
    "limit_norm_growth": (_gradcheck_limit, _hand_limit, _turned_limit, _numpy_limit),
    "low_rank_scales": (_gradcheck_scales, _hand_scales, _turned_scales, _numpy_scales),
    "low_rank_update": (_gradcheck_update, _hand_update, _transposed_update, _numpy_update),
    "weight_norm_gradients": (_gradcheck_norms, _hand_norms, _radial_norms, _autograd_norms),
    "weight_norm_step": (
        _gradcheck_norm_step,
        _hand_norm_step,
        _lengths_of_norm_step,
        _numpy_norm_step,
    ),
}
