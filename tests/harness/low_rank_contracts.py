"""What the contract of `functional` asks of subspaces of gradients, and the family's whole list.

Each entry: gradcheck, a value worked by hand, an invariance, an independent version in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.low_rank_update_contracts import (
    RANK,
    UPDATE_CONTRACTS,
    Array,
    Four,
    new_basis,
    normal,
)
from lightning_ext import functional


def _no_gradient(make: Callable[[Tensor], Any]) -> bool:
    found = make(normal(7, 5).requires_grad_())
    return not (isinstance(found, Tensor) and found.requires_grad)


# gaussian_projection


def _philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def _numpy_gaussian() -> tuple[Tensor, Array]:
    words = [w for i in range(4) for w in _philox([i, 0, 3, 4], [2, 0])][:16]
    found = []
    for u, v in zip(words[::2], words[1::2], strict=True):
        length = math.sqrt(-2 * math.log((u + 0.5) / 2**32))
        angle = 2 * math.pi * (v + 0.5) / 2**32
        found += [length * math.cos(angle), length * math.sin(angle)]
    truth = np.array(found[:15]).reshape(3, 5) / math.sqrt(3)
    how: dict[str, Any] = {"seed": 2, "step": 3, "stream": 4, "dtype": torch.float64}
    return functional.gaussian_projection(3, 5, **how), truth


def _unit_gaussian() -> tuple[Tensor, list[float]]:
    # Variance 1/r: columns are about 1 long, to 4 standard errors of their mean square.
    found = functional.gaussian_projection(64, 500, seed=1).square().sum(0).mean()
    return (found - 1).abs().lt(4 * math.sqrt(2 / 64 / 500)).view(1), [True]


def _rank_gaussian() -> tuple[Tensor, Tensor]:
    one, four = (functional.gaussian_projection(r, 12 // r, seed=5) for r in (1, 4))
    return 2 * four.view(-1), one.view(-1)


# gradient_subspace


def _projector(basis: Tensor) -> Tensor:
    return basis.T @ basis


def _hand_subspace() -> tuple[Tensor, list[Any]]:
    grad = torch.diag(torch.tensor([2.0, 5.0, 3.0]).double())[:, :3]
    return functional.gradient_subspace(grad, 2).abs(), [[0, 1, 0], [0, 0, 1]]


def _transposed_subspace() -> tuple[Tensor, Tensor]:
    grad = normal(9, 6)
    found = [functional.gradient_subspace(x, RANK, method="svd") for x in (grad, grad.T)]
    return _projector(found[0]), _projector(found[1])


def _numpy_subspace() -> tuple[Tensor, Array]:
    # Of rank 3: every method finds all of it.
    grad = normal(9, RANK) @ normal(RANK, 6)
    right = np.linalg.svd(grad.numpy())[2][:RANK]
    found = [functional.gradient_subspace(grad, RANK, method="randomized")]
    found.append(functional.gradient_subspace(grad, RANK, method="iteration", previous=found[0]))
    return torch.stack([_projector(x) for x in found]), np.stack([right.T @ right] * 2)


# project_gradient, project_back


def _gradcheck_project() -> bool:
    basis = new_basis()
    check = torch.autograd.gradcheck
    tall, wide = (normal(*shape).requires_grad_() for shape in ((7, 5), (5, 7)))
    return all(check(lambda x: functional.project_gradient(x, basis), (x,)) for x in (tall, wide))


def _hand_project() -> tuple[Tensor, list[Any]]:
    wide = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    return functional.project_gradient(wide, torch.tensor([[0.0, 1.0]])), [[4], [5], [6]]


def _transposed_project() -> tuple[Tensor, Tensor]:
    grad, basis = normal(7, 5), new_basis()
    project = functional.project_gradient
    return project(grad.T, basis), project(grad, basis)


def _numpy_project() -> tuple[Tensor, Array]:
    grad, basis = normal(5, 7), new_basis()
    truth = np.einsum("sl,rs->lr", grad.numpy(), basis.numpy())
    return functional.project_gradient(grad, basis), truth


def _gradcheck_back() -> bool:
    basis, low = new_basis(), normal(7, RANK).requires_grad_()
    return all(
        torch.autograd.gradcheck(lambda x, s=shape: functional.project_back(x, basis, s), (low,))
        for shape in ((7, 5), (5, 7))
    )


def _hand_back() -> tuple[Tensor, list[Any]]:
    low, basis = torch.tensor([[4.0], [5.0], [6.0]]), torch.tensor([[0.0, 1.0]])
    return functional.project_back(low, basis, (2, 3)), [[0, 0, 0], [4, 5, 6]]


def _there_and_back() -> tuple[Tensor, Tensor]:
    low, basis = normal(7, RANK), new_basis()
    return functional.project_gradient(functional.project_back(low, basis, (5, 7)), basis), low


def _numpy_back() -> tuple[Tensor, Array]:
    low, basis = normal(7, RANK), new_basis()
    truth = np.einsum("lr,rs->sl", low.numpy(), basis.numpy())
    return functional.project_back(low, basis, (5, 7)), truth


# subspace_similarity, lazy_refresh_gap


def _gradcheck_similarity() -> bool:
    pair = normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()
    return torch.autograd.gradcheck(functional.subspace_similarity, pair)


def _hand_similarity() -> tuple[Tensor, list[float]]:
    one, other = torch.tensor([[3.0, 4.0], [9.0, 9.0]]), torch.tensor([[-1.0, 0.0]])
    zero = torch.zeros(1, 2)
    found = [functional.subspace_similarity(one, x) for x in (other, zero)]
    return torch.stack(found).mul(5).round(), [3, 0]


def _signed_similarity() -> tuple[Tensor, Tensor]:
    one, other = normal(3, 5), normal(3, 5)
    similarity = functional.subspace_similarity
    return similarity(-2 * one, other), similarity(one, other)


def _numpy_similarity() -> tuple[Tensor, Array]:
    one, other = normal(3, 5), normal(3, 5)
    a, b = one[0].numpy(), other[0].numpy()
    truth = abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
    return functional.subspace_similarity(one, other), truth


def _gap(*similarities: float, **how: Any) -> int:
    return functional.lazy_refresh_gap(torch.tensor(similarities), 100, **how)


def _hand_gap() -> tuple[Tensor, list[int]]:
    some = (0.0, 0.4, 0.5, 0.4, 0.5, 0.4)
    found = [_gap(*some), _gap(*some[:5]), _gap(*some[1:5]), _gap(0.3, threshold=0.25, memory=1)]
    return torch.tensor(found), [200, 100, 100, 200]


def _ordered_gap() -> tuple[Tensor, Tensor]:
    some = torch.rand(8, 5)
    gaps = [[_gap(*row.tolist()) for row in rows] for rows in (some, some.flip(1))]
    return torch.tensor(gaps[0]), torch.tensor(gaps[1])


def _numpy_gap() -> tuple[Tensor, Array]:
    some = torch.rand(20, 7)
    truth = [100 * (1 + (np.mean(row[2:]) >= 0.4)) for row in some.numpy()]
    return torch.tensor([_gap(*row.tolist()) for row in some]), np.array(truth)


LOW_RANK_CONTRACTS: dict[str, Four] = UPDATE_CONTRACTS | {
    "gaussian_projection": (
        partial(_no_gradient, lambda _: functional.gaussian_projection(2, 3, seed=0)),
        _unit_gaussian,
        _rank_gaussian,
        _numpy_gaussian,
    ),
    "gradient_subspace": (
        partial(_no_gradient, lambda x: functional.gradient_subspace(x, 2)),
        _hand_subspace,
        _transposed_subspace,
        _numpy_subspace,
    ),
    "lazy_refresh_gap": (
        partial(_no_gradient, lambda x: functional.lazy_refresh_gap(x[0], 3)),
        _hand_gap,
        _ordered_gap,
        _numpy_gap,
    ),
    "project_back": (_gradcheck_back, _hand_back, _there_and_back, _numpy_back),
    "project_gradient": (_gradcheck_project, _hand_project, _transposed_project, _numpy_project),
    "subspace_similarity": (
        _gradcheck_similarity,
        _hand_similarity,
        _signed_similarity,
        _numpy_similarity,
    ),
}
