"""Sums of exponentials over the rows of all ranks, whose logits no rank holds.

Source: Cheng et al. 2024 (Inf-CL, arXiv:2410.17243): blocks of other ranks, forward and backward.
Differs: see ``functional.block_logsumexp``, which takes the blocks, and ``_ranks``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ext.functional import merge_logsumexp
from lightning_ext.kernels import block_logsumexp, block_logsumexp_grads
from lightning_ext.losses import _ranks as ranks


def spread_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    group: dist.ProcessGroup,
    *,
    labels: Tensor | None = None,
    own: Tensor | None = None,
    columns: bool = True,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return r, c and p of ``block_logsumexp`` for own rows of x and y among those of all ranks.

    Labels, and columns to leave out, are those of the own block. The backward pass gives rank j
    the gradient of Σ_k L_k, and the scale the mean over ranks of that.
    """
    labels = torch.arange(len(x), device=x.device) if labels is None else labels
    scale = torch.as_tensor(scale, dtype=torch.promote_types(x.dtype, torch.float32))
    return SpreadLogSumExp.apply(x, y, scale, labels, own, columns, group, fused)


class SpreadLogSumExp(torch.autograd.Function):
    """Blocks of columns in turn; the backward pass keeps own rows and sums alone."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, columns and positives of this rank."""
        x, y, scale, labels, own, columns, group, fused = given
        rows = x.new_full((len(x),), -torch.inf, dtype=torch.float64)
        positives, parts = torch.zeros_like(rows), []
        for source, (block,) in ranks.blocks(group, y):
            how = _places(labels, own, source == dist.get_rank(group)) | {"fused": fused}
            found = block_logsumexp(x, block, scale, columns=columns, **how)
            rows = merge_logsumexp(rows, found.rows)
            positives += found.positives
            parts.append(found.columns)
        lower = rows.new_empty(0)
        if columns:  # those of the own block, over the rows of all ranks
            lower = ranks.exchange(group, torch.stack(parts)).logsumexp(0)
        ctx.save_for_backward(x, y, scale, labels, own, rows, lower)
        ctx.how = columns, group, fused
        return rows, lower, positives

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for x, y and scale."""
        ranks.refuse_second_derivative()
        x, y, scale, labels, own, rows, lower = ctx.saved_tensors
        (columns, group, fused), (grad_rows, grad_columns, grad_positives) = ctx.how, grads
        dx, ds = x.new_zeros(()), x.new_zeros((), dtype=torch.float64)
        dy: Tensor | None = None
        sides = (lower, grad_columns) if columns else ()
        for source, (block, *sums) in ranks.blocks(group, y, *sides):
            here = source == dist.get_rank(group)
            of_block = sums or (None, None)
            more_x, more_y, more_s = block_logsumexp_grads(
                *(x, block, scale, rows, of_block[0], grad_rows, of_block[1], grad_positives),
                **_places(labels, own, here),
                fused=fused,
            )
            dx, ds = dx + more_x, ds + more_s
            if ctx.needs_input_grad[1]:
                total = ranks.sum_at(group, source, more_y)
                dy = dy if total is None else total.to(y.dtype)
        if ctx.needs_input_grad[2]:
            ds = ranks.mean_over(group, ds)
        return dx.to(x.dtype), dy, ds.to(scale.dtype), *[None] * 5


def _places(labels: Tensor, own: Tensor | None, here: bool) -> dict[str, Any]:
    """Where positives and left-out columns are: none in another rank's block."""
    return {
        "labels": labels if here else torch.full_like(labels, -1),
        "own": own if here else None,
    }
