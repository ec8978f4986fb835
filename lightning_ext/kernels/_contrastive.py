"""Contrastive losses over all pairs of a batch by kernels that never store all logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._contrastive._blocks import BlockLogSumExp
from lightning_ext.functional._contrastive._formulas import (
    Reduction,
    clip_by,
    info_nce_by,
    nt_xent_by,
    reduced,
)
from lightning_ext.functional._contrastive._inputs import (
    as_index,
    check_pair,
    check_reduction,
    check_vector,
)
from lightning_ext.functional._contrastive._once_differentiable import OnceDifferentiable
from lightning_ext.kernels._contrastive_blocks import block_logsumexp, chosen, scalar, sums_of


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    reduction: Reduction = "mean",
    fused: bool | None = None,
) -> Tensor:
    """Return what ``functional.clip_loss`` does, which has the equation.

    Precision and memory of the kernel: as in ``block_logsumexp`` and its gradients.

    Args:
        image: x, shape (b, d).
        text: y, of the same shape and dtype.
        scale: s, a number or a tensor of shape ().
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (), or (b,) for ``"none"``; at least float32.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.clip_loss``, or a dtype that kernels do not take.
        ValueError: as ``functional.clip_loss``.
    """
    if not chosen(fused, "clip_loss", image, text):
        return functional.clip_loss(image, text, scale, reduction=reduction)
    return clip_by(_sums, image, text, scale, reduction)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    reduction: Reduction = "mean",
    fused: bool | None = None,
) -> Tensor:
    """Return what ``functional.info_nce_loss`` does, which has the equation.

    Precision and memory of the kernel: as in ``block_logsumexp`` and its gradients. ``excluded`` is
    read tile by tile, and broadcast without a copy.

    Args:
        query: q, shape (m, d).
        key: k, shape (n, d), same dtype.
        scale: s, a number or a tensor of shape ().
        labels: integers in [0, n), shape (m,); by default i for query i.
        excluded: boolean, broadcastable to (m, n).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (), or (m,) for ``"none"``; at least float32.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.info_nce_loss``, or a dtype that kernels do not take.
        ValueError: as ``functional.info_nce_loss``.
    """
    given: dict[str, Any] = {"labels": labels, "excluded": excluded}
    if not chosen(fused, "info_nce_loss", query, key, labels, excluded):
        return functional.info_nce_loss(query, key, scale, **given, reduction=reduction)
    return info_nce_by(_sums, query, key, scale, **given, reduction=reduction)


def nt_xent_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    *,
    reduction: Reduction = "mean",
    fused: bool | None = None,
) -> Tensor:
    """Return what ``functional.nt_xent_loss`` does, which has the equation.

    Precision and memory of the kernel: as in ``block_logsumexp`` and its gradients. As the logits
    are symmetric the backward pass has two products instead of three.

    Args:
        a: the first views, shape (n, d).
        b: the second views, same shape and dtype.
        scale: s, a number or a tensor of shape ().
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (), or (2n,) for ``"none"``, those of a first; at least float32.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.nt_xent_loss``, or a dtype that kernels do not take.
        ValueError: as ``functional.nt_xent_loss``.
    """
    if not chosen(fused, "nt_xent_loss", a, b):
        return functional.nt_xent_loss(a, b, scale, reduction=reduction)
    return nt_xent_by(_mirrored_sums, a, b, scale, reduction)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    fused: bool | None = None,
) -> Tensor:
    """Return what ``functional.siglip_loss`` does, which has the equation.

    Precision and memory of the kernel: as in ``block_logsumexp`` and its gradients.

    Args:
        image: x, shape (m, d).
        text: y, shape (n, d), same dtype.
        scale: s, a number or a tensor of shape ().
        bias: b, a number or a tensor of shape ().
        labels: integers, shape (m,), out of [0, n) for no text; by default i for image i.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (), or (m,) for ``"none"``; at least float32.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.siglip_loss``, or a dtype that kernels do not take.
        ValueError: as ``functional.siglip_loss``.
    """
    if not chosen(fused, "siglip_loss", image, text, labels):
        given: dict[str, Any] = {"labels": labels, "reduction": reduction}
        return functional.siglip_loss(image, text, scale, bias, **given)
    check_reduction(reduction)
    losses = _Sigmoid.apply(*_checked(image, text, scale, bias, labels))
    return reduced(losses, image, reduction)


def siglip_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    grad_rows: Tensor,
    *,
    labels: Tensor | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``functional.siglip_grads`` does, which says what the arguments are.

    Precision and memory of the kernel: as in ``block_logsumexp_grads``.

    Args:
        image: x, shape (m, d).
        text: y, shape (n, d), same dtype.
        scale: s, a number or a tensor of shape ().
        bias: b, a number or a tensor of shape ().
        grad_rows: ∂ℓ, shape (m,).
        labels: as in ``siglip_loss``.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Those of image and text, at least float32; of scale and bias, float64.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.siglip_grads``, or a dtype that kernels do not take.
        ValueError: as ``functional.siglip_grads``.
    """
    if not chosen(fused, "siglip_grads", image, text, labels):
        return functional.siglip_grads(image, text, scale, bias, grad_rows, labels=labels)
    inputs = _checked(image, text, scale, bias, labels)
    check_vector(grad_rows, "grad_rows", image)
    dx, dy, ds, db = _sigmoid_grads(inputs, grad_rows, (torch.float32, torch.float32))
    assert dx is not None
    assert dy is not None
    return dx, dy, ds, db


_sums = partial(block_logsumexp, fused=True)


def _mirrored_sums(views: Tensor, scale: Tensor | float, pair: Tensor) -> BlockLogSumExp:
    own = torch.arange(len(views), device=views.device)
    inputs = (views, views.detach(), scalar(scale, "scale", views), pair, None, own)
    return sums_of(inputs, columns=False, mirrored=True)


def _checked(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    check_pair(image, text, ("image", "text"))
    labels = None if labels is None else as_index(labels, "labels", image).contiguous()
    return image, text, scalar(scale, "scale", image), scalar(bias, "bias", image), labels


def _sigmoid_grads(
    inputs: tuple[Tensor | None, ...],
    grad_rows: Tensor,
    wanted: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    from lightning_ext.kernels._triton._contrastive import _sigmoid as _contrastive_sigmoid

    *numbers, labels = (None if v is None else v.detach() for v in inputs)
    given: list[Any] = [*numbers, grad_rows.detach().float().contiguous()]
    return _contrastive_sigmoid.sigmoid_grads(*given, labels=labels, wanted=wanted)


class _Sigmoid(torch.autograd.Function):
    """The forward launches, with a backward pass that keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return one loss for each image."""
        from lightning_ext.kernels._triton._contrastive import _sigmoid as _contrastive_sigmoid

        *pair, labels = inputs
        ctx.save_for_backward(*inputs)
        return _contrastive_sigmoid.sigmoid_rows(*pair, labels=labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for image, text, scale and bias."""
        found = _SigmoidGrads.apply(*ctx.saved_tensors, grad, ctx.needs_input_grad[:2])
        return (*found, None)


class _SigmoidGrads(OnceDifferentiable):
    """The backward launches."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor | None, ...]:
        """Return gradients for image, text, scale and bias, in their dtypes."""
        *inputs, grad, needed = given
        of_x, of_y = (v.dtype if n else None for v, n in zip(inputs[:2], needed, strict=True))
        dx, dy, ds, db = _sigmoid_grads(tuple(inputs), grad, (of_x, of_y))
        return dx, dy, ds.float(), db.float()
