"""Layer and RMS normalization whose backward pass leaves the gradient norms of single samples.

Source: Ba et al. 2016 (arXiv:1607.06450); Zhang and Sennrich 2019 (arXiv:1910.07467) for RMSNorm;
    Gray et al. 2024 (arXiv:2411.00999), who take the noise scale from such norms.
Differs: what a sample adds to the gradient of γ is a sum over its positions, and the gradient the
    sum of these over samples: one pass makes both. The norms are added to a tensor of the caller's,
    as a backward pass can return gradients alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_ext.functional._layer_norm_checks import check_norm, rms_eps
from lightning_ext.functional._widen import widen

_TILE = 1 << 16  # entries of which a few copies stay in a core's cache
_LARGE = 1 << 13  # entries of a sample that are worth a call of their own


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    sample_sq_norms: Tensor | None = None,
) -> Tensor:
    """Return y = γ ∘ x̂ + β, x̂ = (x − mean)/√(var + eps) over the last dimensions, as torch's.

    With ``sample_sq_norms`` the backward pass adds to it, for each sample i,

        |Σ_t d_it ∘ x̂_it|²  and  |Σ_t d_it|²,    d = ∂L/∂y, t over the positions of the sample,

    which are |∂L/∂γ|² and |∂L/∂β|² of what the sample contributes to L. Where L is the mean over n
    samples, n² times these belong to the samples' own losses. Statistics and sums are taken in
    ``torch.promote_types(x.dtype, torch.float32)``.

    Args:
        input: x, shape (samples, …, features); (…, features) will do without ``sample_sq_norms``.
        normalized_shape: the features: the last dimension of x, or several.
        weight: γ, of ``normalized_shape``, in the dtype of x or wider.
        bias: β, likewise; not without γ.
        eps: added to the variance, at least 0.
        sample_sq_norms: shape (1, samples), or (2, samples) where there is a bias, for γ and β, in
            the dtype of the sums. It is added to by every backward pass through every call, one
            after another: of a layer that is called several times the products between the calls
            are missing; give it all inputs in one call, side by side as positions. Without it
            gradients have gradients, with it they have none.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: if dtypes do not fit, or DTensors meet plain tensors.
        ValueError: if shapes or devices do not fit, or eps is negative.

    Example:
        >>> weight, found = torch.ones(2, requires_grad=True), torch.zeros(1, 3)
        >>> x = torch.tensor([[1.0, 5.0]] * 3)
        >>> y = layer_norm(x, 2, weight, eps=0.0, sample_sq_norms=found)
        >>> (y * torch.tensor([[1.0], [2.0], [0.0]])).sum().backward()
        >>> found.round(decimals=3), weight.grad
        (tensor([[2., 8., 0.]]), tensor([-3.,  3.]))
    """
    x, weight, bias = check_norm(input, normalized_shape, weight, bias, eps, sample_sq_norms)
    if sample_sq_norms is not None:
        found: Tensor = _SampleNorms.apply(x, weight, bias, eps, True, sample_sq_norms)
        return found.reshape(input.shape)
    wide, weight, bias = _in_one_dtype(x, weight, bias)
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype).reshape(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    sample_sq_norms: Tensor | None = None,
) -> Tensor:
    """Return y = γ ∘ x̂, x̂ = x/√(mean x² + eps) over the last dimensions, as torch's.

    With ``sample_sq_norms`` the backward pass adds |Σ_t d_it ∘ x̂_it|² to it for each sample i, as
    that of ``layer_norm`` does.

    Args:
        input: x, shape (samples, …, features); (…, features) will do without ``sample_sq_norms``.
        normalized_shape: the features: the last dimension of x, or several.
        weight: γ, of ``normalized_shape``, in the dtype of x or wider.
        eps: added to the mean of squares, at least 0. ``None`` is, as torch's, the spacing of
            numbers beside 1 in the precision of the sums: 1.2e-7 in float32 and below, 2.2e-16 in
            float64.
        sample_sq_norms: shape (1, samples), see ``layer_norm``.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: if dtypes do not fit, or DTensors meet plain tensors.
        ValueError: if shapes or devices do not fit, or eps is negative.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 3.0], [-2.0, 2.0]]), 2, eps=0.0)
        tensor([[ 1.,  1.],
                [-1.,  1.]])
    """
    eps = rms_eps(input, eps)
    x, weight, _ = check_norm(input, normalized_shape, weight, None, eps, sample_sq_norms)
    if sample_sq_norms is not None:
        found: Tensor = _SampleNorms.apply(x, weight, None, eps, False, sample_sq_norms)
        return found.reshape(input.shape)
    wide, weight, _ = _in_one_dtype(x, weight, None)
    return F.rms_norm(wide, x.shape[-1:], weight, eps).to(x.dtype).reshape(input.shape)


def _in_one_dtype(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As they are, or all in the widest of their dtypes, at least float32, where they differ."""
    given = [p for p in (weight, bias) if p is not None]
    if all(p.dtype == x.dtype for p in given):
        return x, weight, bias
    dtype = torch.float32
    for p in (x, *given):
        dtype = torch.promote_types(dtype, p.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return x.to(dtype), weight, bias


class _SampleNorms(torch.autograd.Function):
    """Either normalization, with a backward pass by samples."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        sample_sq_norms: Tensor,
    ) -> Tensor:
        wide, scale, shift = widen(x), widen(weight), None if bias is None else widen(bias)
        mean: Tensor | None = None
        if centered:
            y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], scale, shift, eps)
        else:
            size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            rstd = (size.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
            y = (wide * rstd).mul_(scale)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sample_sq_norms = sample_sq_norms
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide, into = widen(weight), ctx.sample_sq_norms
        if mean is not None and mean.numel() == x.shape[0]:
            dx, scale, shift = _backward(d, x, wide, mean, rstd, [True] * 3)
            dx = dx.to(x.dtype)
            _add_row_squares(into, d, x, mean, rstd)
        else:
            parts = _one_by_one if _is_one_by_one(x, mean) else _in_tiles
            dx, scales, shifts = parts(d, x, wide, mean, rstd)
            for row, found in zip(into, (scales, shifts), strict=False):
                row.add_(found.square().sum(1))
            scale, shift = scales.sum(0), shifts.sum(0)
        bias_grad = None if bias is None else shift.to(bias.dtype)
        return dx, scale.to(weight.dtype), bias_grad, None, None, None


def _is_one_by_one(x: Tensor, mean: Tensor | None) -> bool:
    """Whether torch's own backward pass, a sample at a time, is the faster one."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and mean is not None and x.numel() >= _LARGE * x.shape[0]


def _one_by_one(
    d: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_in_tiles`` returns, for layer normalization."""
    dx = torch.empty_like(x)
    scale, shift = rstd.new_empty(2, x.shape[0], x.shape[-1]).unbind()
    for i in range(x.shape[0]):
        found = _backward(d[i], x[i], weight, mean[i], rstd[i], [True] * 3)
        dx[i], scale[i], shift[i] = found
    return dx, scale, shift


def _backward(
    d: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂x, ∂L/∂γ and ∂L/∂β by torch."""
    d, x = widen(d), widen(x)
    return torch.ops.aten.native_layer_norm_backward(
        d, x, x.shape[-1:], mean, rstd, weight, weight, wanted
    )


def _add_row_squares(into: Tensor, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """The norms of samples of one position each."""
    shape = (x.shape[0], 1, x.shape[-1])
    d, rows = d.reshape(shape), x.reshape(shape)
    mean, rstd = (part.reshape(-1, 1, 1) for part in (mean, rstd))
    for here in _tiles(rows):
        gradient = widen(d[here])
        product = (widen(rows[here]) - mean[here]).mul_(rstd[here]).mul_(gradient)
        for row, found in zip(into, (product, gradient), strict=False):
            row[here[0]] += torch.linalg.vector_norm(found, dim=(1, 2)).square()


def _in_tiles(
    d: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂x, and what each sample adds to ∂L/∂γ and ∂L/∂β."""
    if mean is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        dx = _backward(d, x, weight, mean, rstd, [True, False, False])[0].to(x.dtype)
    shape = (x.shape[0], math.prod(x.shape[1:-1]))
    d, rows, result = (part.reshape(*shape, x.shape[-1]) for part in (d, x, dx))
    rstd = rstd.reshape(*shape, 1)
    offset = None if mean is None else mean.reshape(*shape, 1) * rstd
    scale, shift = rstd.new_zeros(2, shape[0], x.shape[-1]).unbind()
    for here in _tiles(rows):
        normalized, gradient = widen(rows[here]) * rstd[here], widen(d[here])
        if offset is not None:
            scale[here[0]] += (normalized.sub_(offset[here])).mul_(gradient).sum(1)
            shift[here[0]] += gradient.sum(1)
            continue
        product = gradient * normalized
        scale[here[0]] += product.sum(1)
        along = (product @ weight).div_(x.shape[-1])
        found = (gradient * weight).addcmul_(normalized, along[..., None], value=-1)
        result[here] = found.mul_(rstd[here])
    return dx, scale, shift


def _tiles(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of their positions; one of all but for the caches of a CPU."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(None), slice(None)
        return
    samples, positions, features = rows.shape
    count = max(1, _TILE // features)
    step = max(1, count // max(positions, 1))
    for sample in range(0, samples, step):
        for position in range(0, positions, count):
            yield slice(sample, sample + step), slice(position, position + count)
