"""Layer and RMS normalization with the gradient norms of single samples, without another pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ext import functional
from lightning_ext.functional._layer_norm_checks import check_norm, rms_eps
from lightning_ext.kernels._fused import use_triton
from lightning_ext.kernels._recomputed_gradient import recomputed


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    sample_sq_norms: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Return γ ∘ (x − mean)/√(var + eps) + β, as ``functional.layer_norm``, which says more.

    The kernel keeps the mean and 1/√(var + eps) of each row, and 4 bytes for each feature and each
    run of 16 to 128 positions (of one, where samples have fewer) during the backward pass, twice
    that with a bias. Where gradients are to have gradients, they are those of the plain operation;
    with ``sample_sq_norms`` they have none.

    Args:
        input: x, shape (samples, …, features); (…, features) will do without ``sample_sq_norms``.
        normalized_shape: the features: the last dimension of x, or several.
        weight: γ, of ``normalized_shape``, in the dtype of x or wider.
        bias: β, likewise; not without γ.
        eps: added to the variance, at least 0.
        sample_sq_norms: shape (1, samples), or (2, samples) where there is a bias, float32; what
            backward adds |∂L/∂γ|² and |∂L/∂β|² of each sample to.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        The shape and dtype of x.

    Raises:
        RuntimeError: ``fused=True`` where the kernel cannot run.
        TypeError: if dtypes do not fit, or ``fused=True`` with one the kernel does not take.
        ValueError: if shapes or devices do not fit, or eps is negative.
    """
    x, weight, bias = check_norm(input, normalized_shape, weight, bias, eps, sample_sq_norms)
    given = [t for t in (x, weight, bias, sample_sq_norms) if t is not None]
    if not use_triton(fused, given, op="layer_norm"):
        y = functional.layer_norm(
            x, x.shape[-1:], weight, bias, eps, sample_sq_norms=sample_sq_norms
        )
    else:
        y = _Norm.apply(x, weight, bias, eps, True, sample_sq_norms)
    return y.reshape(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    sample_sq_norms: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Return γ ∘ x/√(mean x² + eps), as ``functional.rms_norm``, which says more.

    Args:
        input: x, shape (samples, …, features); (…, features) will do without ``sample_sq_norms``.
        normalized_shape: the features: the last dimension of x, or several.
        weight: γ, of ``normalized_shape``, in the dtype of x or wider.
        eps: added to the mean of squares, at least 0; ``None`` is torch's, 1.2e-7 in
            float32 and below.
        sample_sq_norms: shape (1, samples), float32; what backward adds |∂L/∂γ|² of each sample to.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        The shape and dtype of x.

    Raises:
        RuntimeError: ``fused=True`` where the kernel cannot run.
        TypeError: if dtypes do not fit, or ``fused=True`` with one the kernel does not take.
        ValueError: if shapes or devices do not fit, or eps is negative.
    """
    eps = rms_eps(input, eps)
    x, weight, _ = check_norm(input, normalized_shape, weight, None, eps, sample_sq_norms)
    given = [t for t in (x, weight, sample_sq_norms) if t is not None]
    if not use_triton(fused, given, op="rms_norm"):
        y = functional.rms_norm(x, x.shape[-1:], weight, eps, sample_sq_norms=sample_sq_norms)
    else:
        y = _Norm.apply(x, weight, None, eps, False, sample_sq_norms)
    return y.reshape(input.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        sample_sq_norms: Tensor | None,
    ) -> Tensor:
        from lightning_ext.kernels._triton import _layer_norm

        y, saved = _layer_norm.forward(x, weight, bias, eps, centered=centered)
        ctx.save_for_backward(x, weight, bias, saved.mean, saved.rstd)
        ctx.eps, ctx.centered, ctx.sample_sq_norms = eps, centered, sample_sq_norms
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors[:3]
        if torch.is_grad_enabled() and ctx.sample_sq_norms is None:
            given = [t for t in (x, weight, bias) if t is not None]
            wanted = ctx.needs_input_grad[: len(given)]
            found = recomputed(lambda inputs: [_plain(ctx, *inputs)], given, wanted, [d])
            return *found, *[None] * (6 - len(found))
        # What is differentiated twice is refused by a look at the arguments.
        return *_launch_backward(ctx, d, x, weight, bias), None, None, None


def _plain(ctx: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    if ctx.centered:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, ctx.eps)
    return functional.rms_norm(x, x.shape[-1:], weight, ctx.eps)


@once_differentiable
def _launch_backward(
    ctx: Any, d: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    from lightning_ext.kernels._triton import _layer_norm

    mean, rstd = ctx.saved_tensors[3:]
    into = ctx.sample_sq_norms
    dx, scale, shift = _layer_norm.backward(
        d,
        _layer_norm.Saved(x, weight, bias is not None, mean, rstd),
        sums=into is not None or any(ctx.needs_input_grad[1:3]),
        sample_sq_norms=into,
    )
    scale = None if scale is None or weight is None else scale.to(weight.dtype)
    shift = None if shift is None or bias is None else shift.to(bias.dtype)
    return dx, scale, shift
