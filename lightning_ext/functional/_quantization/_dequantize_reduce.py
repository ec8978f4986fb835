"""Sums of what ranks have sent as codes, and these as codes again.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209): between the two hops of its
    all-to-all, gradients are read, added up in full precision and quantized again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._quantization._quantize import quantize
from lightning_ext.functional._quantization._quantized import (
    Quantized,
    check_float_dtype,
    dequantize,
)

REDUCTIONS = ("mean", "sum")


def dequantize_reduce(
    received: Quantized, *, reduction: str = "mean", dtype: torch.dtype | None = None
) -> Tensor:
    """Return the mean or the sum over the first axis of what codes stand for.

    Added up in the order of that axis, in the precision of the scales.

    Args:
        received: rows of several ranks, their codes stacked along a first axis.
        reduction: "mean" or "sum".
        dtype: of the result; by default that of the scales, float32 in "mx" formats.

    Returns:
        Shape (…, length), without the first axis. It has gradients for scales and shifts.

    Raises:
        TypeError: if ``dtype`` is not of real floats.
        ValueError: if shapes do not fit together, nothing was received, or for another reduction.

    Example:
        >>> sent = quantize(torch.tensor([[1.0, -7.0], [3.0, 7.0]]), "int4")
        >>> dequantize_reduce(sent)
        tensor([ 2.,  0.])
    """
    check_float_dtype(dtype)
    ranks = check_received(received, reduction)
    total = 0.0 + dequantize(part(received, 0))  # which makes no negative zero
    for rank in range(1, ranks):
        total += dequantize(part(received, rank))
    if reduction == "mean":
        total = total * (1.0 / ranks)
    return total if dtype is None else total.to(dtype)


def dequantize_reduce_quantize(
    received: Quantized,
    *,
    reduction: str = "mean",
    format: str | None = None,
    symmetric: bool | None = None,
    seed: int | None = None,
    step: int = 0,
    stream: int = 0,
) -> Quantized:
    """Return ``quantize(dequantize_reduce(received))``, in blocks of the same size.

    Args:
        received: rows of several ranks, their codes stacked along a first axis.
        reduction: "mean" or "sum".
        format: of the result; by default that of what was received.
        symmetric: of the result; by default as received.
        seed: as in ``quantize``.
        step: as in ``quantize``.
        stream: as in ``quantize``.

    Returns:
        Codes, scales and shifts without the first axis.

    Raises:
        ValueError: as ``dequantize_reduce`` and ``quantize`` do.
    """
    return quantize(
        dequantize_reduce(received, reduction=reduction),
        format or received.format,
        block_size=received.block_size,
        symmetric=received.shifts is None if symmetric is None else symmetric,
        seed=seed,
        step=step,
        stream=stream,
    )


def part(received: Quantized, rank: int) -> Quantized:
    """Return what one rank has sent.

    Args:
        received: rows of several ranks.
        rank: place along the first axis.
    """
    shifts = None if received.shifts is None else received.shifts[rank]
    return received._replace(
        codes=received.codes[rank], scales=received.scales[rank], shifts=shifts
    )


def check_received(received: Quantized, reduction: str) -> int:
    """Return how many parts were received.

    Args:
        received: rows of several ranks.
        reduction: "mean" or "sum".

    Raises:
        ValueError: if there are none, or for another reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not allowed; it is 'mean' or 'sum'")
    if received.codes.ndim < 2 or not len(received.codes):
        raise ValueError(
            f"codes have shape {tuple(received.codes.shape)}; stack those of one or more ranks "
            "along a first axis before their rows"
        )
    return len(received.codes)
