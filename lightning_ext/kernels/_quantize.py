"""Block quantization, its inverse, and the sum of what ranks have sent, in one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import Quantized
from lightning_ext.functional._quantization._dequantize_reduce import check_received
from lightning_ext.functional._quantization._formats import check_format
from lightning_ext.functional._quantization._quantize import check_quantized_input
from lightning_ext.functional._quantization._quantized import check_float_dtype, check_quantized
from lightning_ext.functional._quantization._random_bits import check_counter
from lightning_ext.kernels._fused import takes_codes, use_triton


def quantize(
    x: Tensor,
    format: str,
    *,
    block_size: int | None = None,
    symmetric: bool = True,
    seed: int | None = None,
    step: int = 0,
    stream: int = 0,
    fused: bool | None = None,
) -> Quantized:
    """Return x as codes with a scale for each block of consecutive entries of its last axis.

    The same codes, scales and shifts as ``functional.quantize``, which has the equations.

    Args:
        x: real floats, shape (…, length), at least one axis.
        format: as in ``functional.quantize``.
        block_size: entries of a block, a power of two from 16 to 4096, 32 in "mx" formats.
        symmetric: without shifts; ``False`` for "int8" and "int4" alone.
        seed: rounds up or down at random; to nearest, even, where ``None``.
        step: of the random bits.
        stream: of the random bits, for instance the rank.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Codes, scales and shifts.

    Raises:
        TypeError: if x is not of real floats.
        ValueError: if x has no axis, or format, block and shift do not fit together.
    """
    check_quantized_input(x)
    _, size = check_format(format, block_size, symmetric)
    check_counter(seed or 0, step, stream)
    if not use_triton(fused, [x], op="quantize"):
        return functional.quantize(
            x,
            format,
            block_size=size,
            symmetric=symmetric,
            seed=seed,
            step=step,
            stream=stream,
        )
    from lightning_ext.kernels._triton._quantization import _quantize

    return _quantize.quantize(x.detach(), format, size, symmetric, seed, step, stream)


def dequantize(
    quantized: Quantized, *, dtype: torch.dtype | None = None, fused: bool | None = None
) -> Tensor:
    """Return the numbers that codes stand for: s·q, or z + s·q where there are shifts.

    Args:
        quantized: what ``quantize`` returned; its rows may have been gathered or sliced.
        dtype: of the result; by default that of the scales, float32 in "mx" formats.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (…, length). The kernel has no gradients for scales and shifts; where they want one
        ``fused=None`` takes the plain operations.

    Raises:
        TypeError: if ``dtype`` is not of real floats.
        ValueError: if shapes or devices do not fit together.
    """
    check_quantized(quantized)
    check_float_dtype(dtype)
    if not _use_triton(fused, quantized, dtype, op="dequantize"):
        return functional.dequantize(quantized, dtype=dtype)
    from lightning_ext.kernels._triton._quantization import _quantize

    return _quantize.dequantize(quantized, ranks=0, factor=1.0, dtype=dtype or torch.float32)


def dequantize_reduce(
    received: Quantized,
    *,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Return the mean or the sum over the first axis of what codes stand for, in one pass.

    Args:
        received: rows of several ranks, their codes stacked along a first axis.
        reduction: "mean" or "sum".
        dtype: of the result; by default that of the scales, float32 in "mx" formats.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (…, length), without the first axis.

    Raises:
        TypeError: if ``dtype`` is not of real floats.
        ValueError: if shapes or devices do not fit together, nothing was received, or for another
            reduction.
    """
    check_quantized(received)
    check_float_dtype(dtype)
    ranks = check_received(received, reduction)
    if not _use_triton(fused, received, dtype, op="dequantize_reduce"):
        return functional.dequantize_reduce(received, reduction=reduction, dtype=dtype)
    from lightning_ext.kernels._triton._quantization import _quantize

    factor = 1.0 / ranks if reduction == "mean" else 1.0
    return _quantize.dequantize(received, ranks=ranks, factor=factor, dtype=dtype or torch.float32)


def dequantize_reduce_quantize(
    received: Quantized,
    *,
    reduction: str = "mean",
    format: str | None = None,
    symmetric: bool | None = None,
    seed: int | None = None,
    step: int = 0,
    stream: int = 0,
    fused: bool | None = None,
) -> Quantized:
    """Return ``quantize(dequantize_reduce(received))``, in blocks of the same size, in one pass.

    Args:
        received: rows of several ranks, their codes stacked along a first axis.
        reduction: "mean" or "sum".
        format: of the result; by default that of what was received.
        symmetric: of the result; by default as received.
        seed: as in ``quantize``.
        step: as in ``quantize``.
        stream: as in ``quantize``.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Codes, scales and shifts without the first axis.

    Raises:
        ValueError: as ``dequantize_reduce`` and ``quantize`` do.
    """
    check_quantized(received)
    ranks = check_received(received, reduction)
    format = format or received.format
    symmetric = received.shifts is None if symmetric is None else symmetric
    check_format(format, received.block_size, symmetric)
    check_counter(seed or 0, step, stream)
    if not _use_triton(fused, received, None, op="dequantize_reduce_quantize"):
        return functional.dequantize_reduce_quantize(
            received,
            reduction=reduction,
            format=format,
            symmetric=symmetric,
            seed=seed,
            step=step,
            stream=stream,
        )
    from lightning_ext.kernels._triton._quantization import _quantize

    factor = 1.0 / ranks if reduction == "mean" else 1.0
    return _quantize.requantize(
        received, format, symmetric, factor=factor, seed=seed, step=step, stream=stream
    )


def _use_triton(
    fused: bool | None, quantized: Quantized, dtype: torch.dtype | None, *, op: str
) -> bool:
    """Decide for codes and a result of another dtype."""
    read = [quantized.codes, quantized.scales]
    if quantized.shifts is not None:
        read.append(quantized.shifts)
    if dtype is not None:
        read.append(torch.empty(0, dtype=dtype, device=quantized.codes.device))
    if fused is None and any(x.requires_grad for x in read):
        return False
    return takes_codes(fused, read, op=op)
