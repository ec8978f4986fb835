"""Tiles of the sigmoid contrastive loss.

Source: Zhai et al. 2023 (SigLIP, arXiv:2303.15343), eq. 1, and section 3.3 for blocks of a ring.
Differs: written with softplus, which keeps small losses; the backward pass keeps no logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ext.functional._contrastive import _tiles as tiles
from lightning_ext.functional._contrastive._inputs import (
    as_labels,
    as_scalar,
    check_pair,
    check_vector,
)
from lightning_ext.functional._contrastive._once_differentiable import OnceDifferentiable
from lightning_ext.functional._widen import widen

_LINEAR_ABOVE = 40.0  # log(1 + exp z) is z there, even in float64
_LOWEST = -60.0  # exp of it, 1e-26, counts as none; that of lower ones is denormal, which is slow


def siglip_rows(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the losses of ``siglip_loss``, one for each image, in float64."""
    return Siglip.apply(*_checked(image, text, scale, bias, labels))


def siglip_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    grad_rows: Tensor,
    *,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of Σ_i ∂ℓ_i·ℓ_i for what ``siglip_loss(reduction="none")`` returns.

    Args:
        image: as given to ``siglip_loss``, like text, scale, bias and labels.
        text: see image.
        scale: see image.
        bias: see image.
        grad_rows: ∂ℓ, shape (m,).
        labels: see image.

    Returns:
        Those of image and text, at least float32 so that blocks add up; of scale and bias, shape
        (), float64.

    Raises:
        TypeError: as ``siglip_loss``.
        ValueError: as ``siglip_loss``, or if the length of ``grad_rows`` does not fit.
    """
    inputs = _checked(image, text, scale, bias, labels)
    check_vector(grad_rows, "grad_rows", image)
    return sigmoid_grads(*inputs, grad_rows)


def _checked(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_pair(image, text, ("image", "text"))
    scalars = as_scalar(scale, "scale", image), as_scalar(bias, "bias", image)
    return image, text, *scalars, as_labels(labels, image)


@torch.library.custom_op("lightning_ext::sigmoid_sums", mutates_args=())
def sigmoid_sums(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """See ``siglip_loss``."""
    left, right = widen(x).contiguous(), widen(y).contiguous()
    losses, memory = left.new_zeros(len(x), dtype=torch.float64), tiles.memory_for_tile(left, right)
    for i, j, _ in tiles.tiles(x, y):
        z = _signed(left[i], right[j], scale, bias, labels[i] - j.start, memory)
        losses[i] += F.softplus(z, 1.0, _LINEAR_ABOVE).sum(1)
    return losses


@sigmoid_sums.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float64)


@torch.library.custom_op("lightning_ext::sigmoid_grads", mutates_args=())
def sigmoid_grads(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor, grad_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``siglip_grads``."""
    left, right = widen(x).contiguous(), widen(y).contiguous()
    memory = tiles.memory_for_tile(left, right)
    dx, dy, db = (
        torch.zeros_like(left),
        torch.zeros_like(right),
        left.new_zeros((), dtype=torch.float64),
    )
    weights = grad_rows.to(left.dtype)[:, None]
    for i, j, _ in tiles.tiles(x, y):
        index = labels[i] - j.start
        z = _signed(left[i], right[j], scale, bias, index, memory).sigmoid_()
        tiles.put(z, index, -tiles.pick(z, index))
        z.mul_(weights[i])
        db += z.sum()
        dx[i].addmm_(z, right[j])
        dy[j].addmm_(z.T, left[i])
    ds = tiles.inner_product(left, dx)
    return dx.mul_(scale), dy.mul_(scale), ds, db


@sigmoid_grads.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor, grad_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dx, dy = (torch.empty(v.shape, dtype=dtype, device=v.device) for v in (x, y))
    ds, db = (dx.new_empty((), dtype=torch.float64) for _ in range(2))
    return dx, dy, ds, db


class Siglip(torch.autograd.Function):
    """``sigmoid_sums`` with a backward pass that keeps its inputs alone."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Return one loss for each image."""
        return sigmoid_sums(x, y, scale, bias, labels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for image, text, scale and bias."""
        return (*SiglipGrads.apply(*ctx.saved_tensors, grad), None)


class SiglipGrads(OnceDifferentiable):
    """The backward pass, which has none of its own."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor, grad_rows: Tensor
    ) -> tuple[Tensor, ...]:
        """Return gradients for image, text, scale and bias, in their dtypes."""
        dx, dy, ds, db = sigmoid_grads(x, y, scale, bias, labels, grad_rows)
        return dx.to(x.dtype), dy.to(y.dtype), ds.to(scale.dtype), db.to(bias.dtype)


def _signed(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, index: Tensor, memory: Tensor
) -> Tensor:
    """Return the logits of a tile, those of positives with the sign changed."""
    z = tiles.product(x, y, scale, memory).add_(bias)
    tiles.put(z, index, -tiles.pick(z, index))
    return z if z.dtype == torch.float64 else z.clamp_(min=_LOWEST)
