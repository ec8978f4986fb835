"""Singular values of a matrix on a scale from 0 to 1.

Source: Jaiswal et al. 2024 (WeLore, arXiv:2407.11239): one threshold for all matrices.
Differs: values that are all alike are 1, since none of them can be spared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain
from lightning_ext.functional._widen import widen


def normalized_singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of each matrix, of which the largest is 1 and the smallest 0.

        σ̂_i = (σ_i − min σ) / (max σ − min σ)

    All are 1 where they differ by no more than rounding, max(m, n) · eps · max σ, as those of an
    orthogonal matrix do. Taken in ``torch.promote_types(weight.dtype, torch.float32)``.

    Args:
        weight: matrices, shape (…, m, n).

    Returns:
        Shape (…, min(m, n)), in descending order.

    Raises:
        TypeError: if it is a DTensor.
        ValueError: if it has fewer than two axes, or no entry.

    Example:
        >>> normalized_singular_values(torch.diag(torch.tensor([3.0, -1.0, 2.0])))
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_plain(weight=weight)
    if weight.ndim < 2 or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be matrices, (…, m, n)")
    values = torch.linalg.svdvals(widen(weight))
    largest, smallest = values[..., :1], values[..., -1:]
    spread = largest - smallest
    rounding = max(weight.shape[-2:]) * torch.finfo(values.dtype).eps * largest
    differ = spread > rounding
    return torch.where(differ, (values - smallest) / torch.where(differ, spread, 1), 1.0)
