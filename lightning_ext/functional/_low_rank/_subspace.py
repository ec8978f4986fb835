"""The subspace in which a matrix's gradients mostly lie.

Source: Zhao et al. 2024 (GaLore, arXiv:2403.03507), section 3, for the projector; Halko, Martinsson
    and Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1, for the randomised one.
Differs: of a wide matrix the basis is kept as rows, too; "iteration" begins where the last subspace
    was, and orders its basis by singular values as the others do. Singular vectors have no sign: it
    is the one of the last time, as moments in their coordinates would turn round with it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ext.functional._low_rank._gaussian import gaussian_projection
from lightning_ext.functional._widen import widen, without_autocast

Subspace = Literal["svd", "randomized", "iteration"]
SUBSPACES: tuple[Subspace, ...] = ("svd", "randomized", "iteration")
_OVERSAMPLING = 8
_POWERS = {"randomized": 2, "iteration": 3}


def gradient_subspace(
    grad: Tensor,
    rank: int,
    *,
    method: Subspace = "svd",
    previous: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
) -> Tensor:
    """Return the first singular vectors of the shorter side of a matrix, as rows.

        "svd"         of G = U Σ Vᵀ
        "randomized"  of XQ, Q an orthonormal basis of (XᵀX)² Ω, Ω Gaussian with rank + 8 columns
        "iteration"   of XQ, Q an orthonormal basis of (XᵀX)³ Pᵀ, P the previous subspace

    with X = G, or Gᵀ where G has more columns than rows.

    Args:
        grad: G, shape (m, n).
        rank: r, at most min(m, n).
        method: as above. "iteration" is "randomized" where there is no previous one.
        previous: P, shape (r, min(m, n)); by it each vector has its sign, by any method.
        seed: of Ω.
        step: of Ω.
        stream: of Ω.

    Returns:
        Shape (r, min(m, n)), rows orthonormal by falling singular values; at least float32, no
        gradient.

    Raises:
        ValueError: if there is no such method, or the rank is out of range.

    Example:
        >>> gradient_subspace(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 1).abs()
        tensor([[1., 0.]])
    """
    check_subspace(method)
    if grad.dim() != 2 or not 1 <= rank <= min(grad.shape):
        raise ValueError(
            f"rank={rank} is not allowed for shape {tuple(grad.shape)}; give a matrix, and a rank"
            " from 1 to its shorter side"
        )
    grad = widen(grad.detach())
    grad = grad / _power_of_two(grad.abs().amax())  # or squares of squares would be no numbers
    with without_autocast(grad):
        basis = _basis(grad, rank, method, previous, {"seed": seed, "step": step, "stream": stream})
    if previous is None:
        return basis
    along = (basis * previous.to(basis.dtype)).sum(1, keepdim=True)
    return torch.where(along < 0, -basis, basis)


def _basis(
    grad: Tensor, rank: int, method: str, previous: Tensor | None, bits: dict[str, Any]
) -> Tensor:
    if method == "svd":
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        return (right[:rank] if is_tall(grad) else left[:, :rank].T).contiguous()
    long = as_tall(grad)
    if method == "iteration" and previous is not None:
        return _by_powers(long, previous.to(grad.dtype).T, rank, _POWERS["iteration"])
    columns = min(rank + _OVERSAMPLING, long.shape[1])
    wide = gaussian_projection(columns, long.shape[1], device=grad.device, **bits)
    return _by_powers(long, wide.to(grad.dtype).T, rank, _POWERS["randomized"])


def project_gradient(grad: Tensor, basis: Tensor) -> Tensor:
    """Return a matrix in the coordinates of a subspace of its shorter side.

        R = G Pᵀ where m ≥ n,  R = Gᵀ Pᵀ where m < n

    Args:
        grad: G, shape (m, n).
        basis: P, shape (r, min(m, n)).

    Returns:
        Shape (max(m, n), r).

    Example:
        >>> project_gradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[2.],
                [4.]])
    """
    with without_autocast(grad):
        return as_tall(grad) @ basis.T


def project_back(low: Tensor, basis: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Return the matrix that has given coordinates in a subspace, and nothing outside of it.

        G = R P where m ≥ n,  G = (R P)ᵀ where m < n

    Args:
        low: R, shape (max(m, n), r).
        basis: P, shape (r, min(m, n)).
        shape: m and n.

    Returns:
        Shape (m, n).

    Example:
        >>> project_back(torch.tensor([[2.0], [4.0]]), torch.tensor([[0.0, 1.0]]), (2, 2))
        tensor([[0., 2.],
                [0., 4.]])
    """
    with without_autocast(low):
        found = low @ basis
    return found if shape[0] >= shape[1] else found.T


def is_tall(grad: Tensor) -> bool:
    """Whether the columns are the shorter side, or none is."""
    return grad.shape[0] >= grad.shape[1]


def as_tall(grad: Tensor) -> Tensor:
    """Return the matrix or its transpose, so that it has at least as many rows as columns."""
    return grad if is_tall(grad) else grad.T


def check_subspace(method: str) -> None:
    """Refuse what is no method.

    Args:
        method: its name.

    Raises:
        ValueError: if it is none.
    """
    if method not in SUBSPACES:
        raise ValueError(f"subspace={method!r} is not allowed; choose one of {SUBSPACES}")


def _by_powers(long: Tensor, start: Tensor, rank: int, powers: int) -> Tensor:
    """The first right singular vectors of what an approximate range keeps of a tall matrix."""
    for _ in range(powers):
        small, _ = torch.linalg.qr(long.T @ (long @ start))
        start = small
    values, turn = torch.linalg.eigh(_gram(long @ start))
    order = values.argsort(descending=True)[:rank]
    return (start @ turn[:, order]).T.contiguous()


def _power_of_two(size: Tensor) -> Tensor:
    """Return the largest power of two that is not above a size, by which division is exact."""
    twice = 2 * torch.frexp(size).mantissa
    return torch.where(size > 0, size / twice, torch.ones_like(size))


def _gram(x: Tensor) -> Tensor:
    return x.T @ x
