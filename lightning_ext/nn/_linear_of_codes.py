"""A linear layer that reads its weight from codes, forward and again backward.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

if TYPE_CHECKING:
    from lightning_ext.nn._int8_weight import Int8Weight


def linear_of_codes(input: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b for the W that codes stand for.

    Args:
        input: x, shape (…, length).
        weight: W as codes, shape (rows, length).
        bias: shape (rows,).

    Returns:
        Shape (…, rows). The gradients of x, W and b are those of ``torch.nn.functional.linear``;
        what is kept for them is x and the codes. Under autocast all is computed in its dtype.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearOfCodes.apply(input, weight, bias)


class _LinearOfCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return linear(input, weight.dequantize(_dtype_of(input, weight)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight.dequantize(grad.dtype) if wanted[0] else None,
            (rows.t() @ input.reshape(-1, input.shape[-1])).to(weight.dtype) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def _dtype_of(input: Tensor, weight: Int8Weight) -> torch.dtype:
    """That of autocast, which the input is in; else the weight's, and torch compares the two."""
    return input.dtype if torch.is_autocast_enabled(input.device.type) else weight.dtype
