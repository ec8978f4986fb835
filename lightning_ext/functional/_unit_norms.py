"""Norms of the units of weights and gradients: rows, filters, whole vectors.

Source: Brock et al. 2021 (arXiv:2102.06171, section 4.1), the units of adaptive gradient clipping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ext.functional._widen import widen_real

_WIDEST = 2**16  # entries of which torch's norm on a CPU adds up too many one after another


def unit_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of every unit of every tensor.

    A unit is a row of a matrix, a filter x[i] of a convolution's weight, and a whole vector.
    Norms are taken in ``torch.promote_types(x.dtype, torch.float32)``, and the gradient of one that
    is 0 is 0.

    Args:
        tensors: of any shapes.

    Returns:
        For each tensor its norms in a shape that broadcasts against it: (n, 1, …, 1) with n units,
        all ones for a vector.

    Example:
        >>> unit_norms([torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])])
        [tensor([[5.],
                [1.]]), tensor([1.])]
    """
    return [_norms(x) for x in tensors]


def unit_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of the norms of a tensor."""
    return (x.shape[0] if x.ndim > 1 else 1,) + (1,) * (x.ndim - 1) if x.ndim else ()


def _norms(x: Tensor) -> Tensor:
    wide = widen_real(x)
    rows = wide.flatten(1) if x.ndim > 1 else wide.reshape(1, -1)
    norms = [torch.linalg.vector_norm(piece, dim=1) for piece in rows.split(_WIDEST, dim=1)]
    whole = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return whole.view(unit_shape(x))
