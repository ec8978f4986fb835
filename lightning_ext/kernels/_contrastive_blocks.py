"""Blocks of a contrastive loss, in two launches forward and three for each strip backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._contrastive._blocks import BlockLogSumExp
from lightning_ext.functional._contrastive._inputs import (
    as_index,
    as_scalar,
    check_excluded,
    check_pair,
    check_vectors,
)
from lightning_ext.functional._contrastive._once_differentiable import OnceDifferentiable
from lightning_ext.kernels._fused import use_triton

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def block_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    own: Tensor | None = None,
    columns: bool = True,
    fused: bool | None = None,
) -> BlockLogSumExp:
    """Return what ``functional.block_logsumexp`` does, which says what the arguments are.

    The kernel sums in float32, takes products of float32 exactly unless torch was told to use TF32
    (``torch.set_float32_matmul_precision("high")``), and keeps about 50 MiB of partial sums at any
    batch. Its gradients are ``block_logsumexp_grads``. Not for ``torch.func``.

    Args:
        x: shape (m, d).
        y: shape (n, d), same dtype.
        scale: s, a number or a tensor of shape ().
        labels: integers, shape (m,).
        excluded: boolean, broadcastable to (m, n).
        own: integers, shape (m,).
        columns: whether c is wanted.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        ``rows``, ``columns`` and ``positives``, float64.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.block_logsumexp``, or a dtype that kernels do not take.
        ValueError: as ``functional.block_logsumexp``.
    """
    if not chosen(fused, "block_logsumexp", x, y, labels, excluded, own):
        given: dict[str, Any] = {"labels": labels, "excluded": excluded, "own": own}
        return functional.block_logsumexp(x, y, scale, **given, columns=columns)
    return sums_of(_checked(x, y, scale, labels, excluded, own), columns=columns)


def block_logsumexp_grads(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    rows: Tensor,
    columns: Tensor | None,
    grad_rows: Tensor,
    grad_columns: Tensor | None,
    grad_positives: Tensor,
    *,
    labels: Tensor | None = None,
    excluded: Tensor | None = None,
    own: Tensor | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``functional.block_logsumexp_grads`` does, which says what the arguments are.

    The kernel keeps gradients in the logits of a strip of rows, in x's dtype: at most 256 MiB, or
    256 rows. Every entry of them is rounded to that dtype, sums are in float32.

    Args:
        x: shape (m, d).
        y: shape (n, d), same dtype.
        scale: s, a number or a tensor of shape ().
        rows: r over all blocks, shape (m,).
        columns: c over all blocks, shape (n,), or None.
        grad_rows: ∂r, shape (m,).
        grad_columns: ∂c, shape (n,), or None.
        grad_positives: ∂p, shape (m,).
        labels: integers, shape (m,).
        excluded: boolean, broadcastable to (m, n).
        own: integers, shape (m,).
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        dx and dy, at least float32; ds, float64.

    Raises:
        RuntimeError: ``fused=True`` where kernels do not run.
        TypeError: as ``functional.block_logsumexp_grads``, or a dtype that kernels do not take.
        ValueError: as ``functional.block_logsumexp_grads``.
    """
    vectors = (rows, columns, grad_rows, grad_columns, grad_positives)
    if not chosen(fused, "block_logsumexp_grads", x, y, labels, excluded, own):
        given: dict[str, Any] = {"labels": labels, "excluded": excluded, "own": own}
        return functional.block_logsumexp_grads(x, y, scale, *vectors, **given)
    inputs = _checked(x, y, scale, labels, excluded, own)
    check_vectors(x, y, *vectors)
    wanted = (torch.float32, torch.float32)
    dx, dy, ds = _grads(inputs, vectors, wanted)
    assert dx is not None
    assert dy is not None
    return dx, dy, ds


def chosen(fused: bool | None, op: str, x: Tensor, y: Tensor, *indices: Tensor | None) -> bool:
    """Return whether the kernel runs."""
    return use_triton(fused, [x, y], op=op, integers=[i for i in indices if i is not None])


def scalar(value: Tensor | float, name: str, like: Tensor) -> Tensor:
    """Return a tensor of shape () in float32, made on the device if it is a number."""
    if isinstance(value, Tensor):
        return as_scalar(value, name, like).float()
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


def sums_of(inputs: Inputs, *, columns: bool, mirrored: bool = False) -> BlockLogSumExp:
    """Return sums and positives by the kernel; ``mirrored`` as in ``nt_xent_loss``."""
    return BlockLogSumExp(*_LogSumExp.apply(*inputs, columns, mirrored))


def _checked(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    labels: Tensor | None,
    excluded: Tensor | None,
    own: Tensor | None,
) -> Inputs:
    check_pair(x, y, ("x", "y"))
    check_excluded(excluded, x, y)
    if excluded is not None:
        excluded = excluded.expand(len(x), len(y)).view(torch.uint8)
    labels = None if labels is None else as_index(labels, "labels", x).contiguous()
    own = None if own is None else as_index(own, "own", x).contiguous()
    return x, y, scalar(scale, "scale", x), labels, excluded, own


def _grads(
    inputs: Inputs,
    vectors: tuple[Tensor | None, ...],
    wanted: tuple[torch.dtype | None, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    from lightning_ext.kernels._triton._contrastive._gradients import logsumexp_grads

    x, y, scale, *masks = (None if v is None else v.detach() for v in inputs)
    sums = [None if v is None else v.detach().contiguous() for v in vectors[:2]]
    grads = [None if v is None else v.detach().float().contiguous() for v in vectors[2:]]
    names = ("labels", "excluded", "own")
    given: dict[str, Any] = dict(zip(names, masks, strict=True)) | {"wanted": wanted}
    factors: list[Any] = [x, y, scale, *sums, *grads]
    return logsumexp_grads(*factors, **given)


class _LogSumExp(torch.autograd.Function):
    """The forward launches, with a backward pass that keeps inputs and sums alone."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, columns and positives."""
        from lightning_ext.kernels._triton._contrastive import _logsumexp as _contrastive

        x, y, scale, labels, excluded, own, columns, mirrored = given
        masks = {"labels": labels, "excluded": excluded, "own": own}
        found = _contrastive.logsumexp(x, y, scale, **masks, columns=columns)
        ctx.save_for_backward(*given[:6], *found[:2])
        ctx.columns, ctx.mirrored = columns, mirrored
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for x, y and scale."""
        wanted = ctx.needs_input_grad[:2]
        found = _LogSumExpGrads.apply(*ctx.saved_tensors, *grads, ctx.columns, ctx.mirrored, wanted)
        return (*found, *[None] * 5)


class _LogSumExpGrads(OnceDifferentiable):
    """The backward launches."""

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor | None, ...]:
        """Return gradients for x, y and scale, in their dtypes."""
        *inputs, rows, columns, grad_rows, grad_columns, grad_positives = given[:-3]
        two_sided, mirrored, needed = given[-3:]
        x, y, scale, labels, *_ = inputs
        if mirrored:
            # An entry and its mirror image are one.
            columns, grad_columns = rows, grad_rows
            grad_positives = grad_positives + grad_positives[labels]
            needed = (any(needed), False)
        elif not two_sided:
            columns = grad_columns = None
        wanted = tuple(v.dtype if n else None for v, n in zip((x, y), needed, strict=True))
        vectors = (rows, columns, grad_rows, grad_columns, grad_positives)
        dx, dy, ds = _grads(tuple(inputs), vectors, wanted)
        return dx, dy, (ds / 2 if mirrored else ds).to(scale.dtype)
