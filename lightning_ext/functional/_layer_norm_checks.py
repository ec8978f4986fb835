"""What both normalizations ask of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_ext.functional._plain import is_distributed


def rms_eps(x: Tensor, eps: float | None) -> float:
    """Return what is added to the mean of squares, by default that of torch."""
    if eps is None and x.is_floating_point():
        return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return 0.0 if eps is None else eps


def check_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    into: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return x, weight and bias with all features in one dimension, or refuse them."""
    shape = _features(x, normalized_shape)
    _check_parts(x, weight, bias, into)
    if math.prod(shape) == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; give floats with features")
    if not eps >= 0:
        raise ValueError(f"eps={eps!r} is not allowed; it must be at least 0")
    if bias is not None and weight is None:
        raise ValueError("a bias was given without a weight; give both, or the weight alone")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if given.shape != shape or given.device != x.device:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} on {given.device}, x {tuple(x.shape)} on "
                f"{x.device}; it must have shape {shape} on the device of x"
            )
        if torch.promote_types(given.dtype, x.dtype) != given.dtype:
            raise TypeError(f"{name} is {given.dtype}; it must be {x.dtype}, as x is, or wider")
    if len(shape) > 1:
        x = x.flatten(-len(shape))
        weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
    if into is not None:
        _check_sample_sq_norms(x, 0 if weight is None else 1 if bias is None else 2, into)
    return x, weight, bias


def _features(x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of what is normalized together."""
    single = isinstance(normalized_shape, int)
    shape = tuple(cast(Sequence[int], [normalized_shape] if single else normalized_shape))
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape={normalized_shape} does not fit x of shape {tuple(x.shape)}; it "
            "must be its last dimension, or several of them, such as x.shape[-1:]"
        )
    return shape


def _check_parts(x: Tensor, *others: Tensor | None) -> None:
    """Refuse DTensors beside plain tensors, and norms of theirs."""
    *parameters, into = others
    given = [is_distributed(t) for t in (x, *parameters) if t is not None]
    if any(given) and not (all(given) and into is None):
        raise TypeError(
            "DTensors and plain tensors were given, or sample_sq_norms of DTensors. Give what "
            "their to_local() returns, the whole of the weights"
        )


def _check_sample_sq_norms(x: Tensor, rows: int, into: Tensor) -> None:
    if rows == 0 or x.ndim < 2:
        raise ValueError(
            f"sample_sq_norms was given {'without a weight' if rows == 0 else 'without samples'}; "
            "it needs a weight, and x of shape (samples, …, features)"
        )
    if into.shape != (rows, x.shape[0]) or into.device != x.device:
        raise ValueError(
            f"sample_sq_norms has shape {tuple(into.shape)} on {into.device}; it must have shape "
            f"{(rows, x.shape[0])}, a row for each of weight and bias, on {x.device}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    if into.dtype != wide or into.requires_grad:
        raise TypeError(
            f"sample_sq_norms is {into.dtype}, requires_grad={into.requires_grad}; it must be "
            f"{wide} and require none"
        )
