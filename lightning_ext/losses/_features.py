"""What each loss does with its features and with the factor of its logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """Return rows of length 1, rounded once to their dtype, if that is wanted."""
    if not normalize:
        return x
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


def check_pairs(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Refuse what are not two matrices of the same shape."""
    if x.ndim != 2 or x.shape != y.shape:
        (a, b), shapes = names, (tuple(x.shape), tuple(y.shape))
        raise ValueError(
            f"{a} and {b} have shapes {shapes[0]} and {shapes[1]}; give two matrices of one shape, "
            "row i of one belongs to row i of the other"
        )


def check_positive(value: float, name: str) -> None:
    """Refuse what is no positive, finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} is not allowed; give a positive, finite number")


def number(value: float, learnable: bool) -> nn.Parameter:
    """Return a parameter of one entry: of none FSDP2 cannot make shards."""
    return nn.Parameter(torch.tensor([value]), requires_grad=learnable)


def scalar(parameter: Tensor) -> Tensor:
    """Return the entry, shape (), at least in float32."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32)).squeeze()


def told(loss: nn.Module) -> str:
    """Return what every loss is set by, for its ``extra_repr``."""
    names = ("normalize", "gather_features", "fused")
    return ", ".join(f"{name}={getattr(loss, name)}" for name in names)


class Capped(torch.autograd.Function):
    """min(x, cap), whose gradient above the cap is 0 only where a step would raise x further.

    With that of ``clamp`` a parameter that has once passed the cap would never come back. Each call
    clamps its own: above the cap, accumulated micro-batches, and ranks with
    ``gather_features=False``, have the mean of clamped gradients, not the clamped mean.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        """Return the smaller of both."""
        ctx.save_for_backward(x > cap)
        return x.clamp(max=cap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient where a step may follow it."""
        (above,) = ctx.saved_tensors
        return torch.where(above, grad.clamp(min=0), grad), None
