"""SigLIP's sums over the texts of all ranks, whose logits no rank holds.

Source: Zhai et al. 2023 (SigLIP, arXiv:2303.15343), section 3.3: blocks of texts, one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ext.kernels import siglip_grads, siglip_loss
from lightning_ext.losses import _ranks as ranks


def spread_siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup,
    *,
    fused: bool | None = None,
) -> Tensor:
    """Return ``siglip_loss`` of each own image among the texts of all ranks, in float64.

    The backward pass gives rank j the gradient of Σ_k L_k, scale and bias the mean over ranks.
    """
    return SpreadSiglip.apply(image, text, scale, bias, group, fused)


class SpreadSiglip(torch.autograd.Function):
    """Blocks of texts in turn; the backward pass keeps own rows alone."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """Return one loss for each own image."""
        image, text, scale, bias, group, fused = given
        losses = image.new_zeros(len(image), dtype=torch.float64)
        for source, (block,) in ranks.blocks(group, text):
            labels = _labels(image, source == dist.get_rank(group))
            how: dict[str, Any] = {"labels": labels, "reduction": "none", "fused": fused}
            losses += siglip_loss(image, block, scale, bias, **how)
        ctx.save_for_backward(image, text, scale, bias)
        ctx.how = group, fused
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for image, text, scale and bias."""
        ranks.refuse_second_derivative()
        (image, text, scale, bias), (group, fused) = ctx.saved_tensors, ctx.how
        dx, numbers = image.new_zeros(()), image.new_zeros(2, dtype=torch.float64)
        dy: Tensor | None = None
        for source, (block,) in ranks.blocks(group, text):
            labels = _labels(image, source == dist.get_rank(group))
            how: dict[str, Any] = {"labels": labels, "fused": fused}
            more_x, more_y, *more = siglip_grads(image, block, scale, bias, grad, **how)
            dx, numbers = dx + more_x, numbers + torch.stack(more)
            if ctx.needs_input_grad[1]:
                total = ranks.sum_at(group, source, more_y)
                dy = dy if total is None else total.to(text.dtype)
        if any(ctx.needs_input_grad[2:4]):
            numbers = ranks.mean_over(group, numbers)
        ds, db = numbers.unbind()
        return dx.to(image.dtype), dy, ds.to(scale.dtype), db.to(bias.dtype), None, None


def _labels(image: Tensor, here: bool) -> Tensor:
    """Each own image's text in a block, out of range in that of another rank."""
    own = torch.arange(len(image), device=image.device)
    return own if here else torch.full_like(own, -1)
