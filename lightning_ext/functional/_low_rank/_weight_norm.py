"""A matrix as lengths and directions of its rows, for steps of each.

Source: Salimans and Kingma 2016 (Weight Normalization, arXiv:1602.07868), equation 3; Huang et al.
    2024 (GradNormLoRP, arXiv:2412.19616), which projects the gradient of the directions.
Differs: the split is made anew of each weight, v = w and g = ‖w‖, so that there is no second copy;
    a row that is 0 has no direction, and steps as a plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_norm_gradients(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by direction and by length of the rows of w = g v/‖v‖ at v = w.

        ∂g = G·w/‖w‖,  ∂v = G − ∂g w/‖w‖

    Args:
        weight: rows w, shape (m, n).
        grad: rows G, of the same shape.

    Returns:
        ∂v, shape (m, n), and ∂g, shape (m, 1); of a row of zeros G and 0.

    Example:
        >>> weight_norm_gradients(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 5.0]]))
        (tensor([[ 0.8000, -0.6000]]), tensor([[7.]]))
    """
    unit = weight / _lengths(weight)
    length_grad = (grad * unit).sum(1, keepdim=True)
    return grad - length_grad * unit, length_grad


def weight_norm_step(weight: Tensor, direction_step: Tensor, length_step: Tensor) -> Tensor:
    """Return a matrix whose rows' directions and lengths have each taken a step.

        w ← (‖w‖ − δg)·(w − δv)/‖w − δv‖

    Args:
        weight: rows w, shape (m, n).
        direction_step: δv, of the same shape.
        length_step: δg, shape (m, 1).

    Returns:
        Shape (m, n); of a row of zeros −δv.

    Example:
        >>> weight_norm_step(torch.tensor([[0.0, 2.0]]), torch.tensor([[-2.0, 2.0]]), 1.0)
        tensor([[1., 0.]])
    """
    moved = weight - direction_step
    length = weight.norm(dim=1, keepdim=True)
    factor = (length - length_step) / _lengths(moved)  # 1 to the last bit where nothing moves
    return moved * torch.where(length > 0, factor, torch.ones_like(factor))


def _lengths(rows: Tensor) -> Tensor:
    """‖row‖, or 1 of a row of zeros, shape (m, 1)."""
    found = rows.norm(dim=1, keepdim=True)
    return torch.where(found > 0, found, torch.ones_like(found))
