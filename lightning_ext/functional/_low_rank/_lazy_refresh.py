"""When a subspace that hardly moves is looked for less often.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296), section 3.2, and its authors' code.
Differs: the absolute cosine, as singular vectors have no sign.
"""

from __future__ import annotations

import torch
from torch import Tensor


def subspace_similarity(basis: Tensor, previous: Tensor) -> Tensor:
    """Return how much of the first vector of a subspace lay along that of another: |cos|.

    Args:
        basis: rows, shape (r, short).
        previous: rows, at least one of the same length.

    Returns:
        Of no dimension, in [0, 1]; 0 where one of them is 0.

    Example:
        >>> subspace_similarity(torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, -2.0]]))
        tensor(0.8000)
    """
    first, second = basis[0], previous[0].to(basis.dtype)
    sizes = first.norm() * second.norm()
    found = (first * second).sum().abs() / torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    return found.clamp_max(1.0)


def lazy_refresh_gap(
    similarities: Tensor, gap: int, *, threshold: float = 0.4, memory: int = 5
) -> int:
    """Return after how many steps a subspace is looked for again.

        gap ← 2 gap where the mean of the last similarities is at least the threshold

    Args:
        similarities: of successive subspaces, the latest last, shape (k,).
        gap: steps since the last time.
        threshold: above 0.
        memory: how many there have to be, and count.

    Example:
        >>> (
        ...     lazy_refresh_gap(torch.full((5,), 0.5), 200),
        ...     lazy_refresh_gap(torch.full((4,), 1.0), 200),
        ... )
        (400, 200)
    """
    if len(similarities) < memory:
        return gap
    return 2 * gap if float(similarities[-memory:].detach().mean()) >= threshold else gap
