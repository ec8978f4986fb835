"""Operators of the softmax contrastive losses: each is one node to a compiler and to autograd.

Differs: loops over tiles stay inside an operator, as ``torch.compile`` would write them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional._contrastive import _tiles as tiles
from lightning_ext.functional._contrastive._once_differentiable import OnceDifferentiable
from lightning_ext.functional._widen import widen


@torch.library.custom_op("lightning_ext::contrastive_sums", mutates_args=())
def logsumexp(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    own: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``block_logsumexp``, and for y None ``mirrored_logsumexp``."""
    left, right, pairs = _wide(x, y, labels, excluded, own)
    return tiles.sums(left, right, scale, pairs, columns)


@logsumexp.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    own: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape[0], dtype=torch.float64)
    lower = rows.new_empty(y.shape[0] if columns and y is not None else 0)
    return rows, lower, torch.empty_like(rows)


@torch.library.custom_op("lightning_ext::contrastive_grads", mutates_args=())
def logsumexp_grads(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    own: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
    grad_rows: Tensor,
    grad_columns: Tensor | None,
    grad_positives: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``block_logsumexp_grads``; for y None, dy is empty."""
    left, right, pairs = _wide(x, y, labels, excluded, own)
    sides = [(rows.double(), grad_rows.double())]
    if pairs.mirrored:
        sides *= 2
    elif columns is not None and grad_columns is not None:
        sides.append((columns.double(), grad_columns.double()))
    dx, dy = tiles.gradients(left, right, scale, pairs, sides, grad_positives.double())
    scale_grad = tiles.inner_product(left, dx)
    if pairs.mirrored:
        return dx.mul_(scale), dx.new_empty(0), scale_grad / 2
    return dx.mul_(scale), dy.mul_(scale), scale_grad


@logsumexp_grads.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    own: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
    grad_rows: Tensor,
    grad_columns: Tensor | None,
    grad_positives: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty(x.shape, dtype=dtype, device=x.device)
    dy = dx.new_empty(0 if y is None else y.shape)
    return dx, dy, dx.new_empty((), dtype=torch.float64)


class LogSumExp(torch.autograd.Function):
    """``logsumexp`` with a backward pass that keeps its inputs and sums alone."""

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        labels: Tensor,
        excluded: Tensor | None,
        own: Tensor | None,
        columns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, columns and positives."""
        return logsumexp(x, y, scale, labels, excluded, own, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what gradients are made of."""
        ctx.save_for_backward(*inputs[:6], *output[:2])
        ctx.columns = inputs[6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for x, y and scale."""
        *inputs, rows, columns = ctx.saved_tensors
        grad_rows, grad_columns, grad_positives = grads
        pair = (columns, grad_columns) if ctx.columns else (None, None)
        vectors = rows, pair[0], grad_rows, pair[1], grad_positives
        return (*LogSumExpGrads.apply(*inputs, *vectors), *[None] * 4)


class LogSumExpGrads(OnceDifferentiable):
    """The backward pass, which has none of its own."""

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        labels: Tensor,
        excluded: Tensor | None,
        own: Tensor | None,
        rows: Tensor,
        columns: Tensor | None,
        grad_rows: Tensor,
        grad_columns: Tensor | None,
        grad_positives: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return gradients for x, y and scale, in their dtypes."""
        inputs = x, y, scale, labels, excluded, own
        vectors = rows, columns, grad_rows, grad_columns, grad_positives
        dx, dy, ds = logsumexp_grads(*inputs, *vectors)
        return dx.to(x.dtype), None if y is None else dy.to(y.dtype), ds.to(scale.dtype)


def _wide(
    x: Tensor, y: Tensor | None, labels: Tensor, excluded: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor, tiles.Pairs]:
    left = widen(x).contiguous()
    right = left if y is None else widen(y).contiguous()
    mask = None if excluded is None else excluded.expand(len(left), len(right))
    return left, right, tiles.Pairs(labels, mask, own, mirrored=y is None)
