"""Optimizer states in fewer bits, each written or read in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import QuantizedState
from lightning_ext.functional._quantization._random_bits import check_counter
from lightning_ext.functional._states._formats import check_state_input
from lightning_ext.functional._states._quantized_state import check_state
from lightning_ext.kernels._fused import takes_codes


def encode_state(
    x: Tensor,
    format: str,
    *,
    signed: bool = True,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    out: QuantizedState | None = None,
    fused: bool | None = None,
) -> QuantizedState:
    """Return a tensor in a format, as ``functional.encode_state`` describes.

    "int4" without a sign takes a launch for the maxima before.

    Args:
        x: real, any shape.
        format: "float32", "bfloat16", "int8", "int4" or "fp8".
        signed: whether entries may be negative.
        seed: of the bits that "bfloat16" is rounded by; see ``random_bits``.
        step: 32 bits.
        stream: 32 bits, another one for each tensor.
        out: a state of the same shape, format and sign to write to.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        The state, without a gradient: ``out`` if there is one.

    Raises:
        TypeError: if x is not real floating point, or with ``fused=True`` of 64 bits.
        ValueError: if there is no such format, ``out`` is of another shape, format or sign, or
            seed, step or stream do not fit.
    """
    check_state_input(x, format, signed, out)
    check_counter(seed, step, stream)
    written = [] if out is None else [out.codes, out.scales]
    shares_nothing = not x.numel() and out is not None and out.reduce is not None
    if shares_nothing or not takes_codes(fused, [x, *written], op="encode_state"):
        return functional.encode_state(
            x, format, signed=signed, seed=seed, step=step, stream=stream, out=out
        )
    from lightning_ext.kernels._triton._states import _encode_state

    if out is None:
        out = functional.zero_state(x.shape, format, signed=signed, device=x.device)
    _encode_state.encode_state(x.detach(), out, seed=seed, step=step, stream=stream)
    return out


def decode_state(state: QuantizedState, *, fused: bool | None = None) -> Tensor:
    """Return what a state stands for, as ``functional.decode_state`` describes.

    Args:
        state: as ``encode_state`` returns it.
        fused: ``None``, the kernel on CUDA where no gradient is wanted; ``True``, the kernel or an
            error; ``False``, torch.

    Returns:
        The state's shape, float32; by torch in the dtype of its scales.

    Raises:
        RuntimeError: with ``fused=True`` for scales that require a gradient.
        TypeError: if codes or scales have another dtype than the format, or with ``fused=True`` for
            scales of 64 bits.
        ValueError: if they do not belong to each other.
    """
    check_state(state)
    if torch.is_grad_enabled() and state.scales.requires_grad:
        if fused:
            raise RuntimeError(
                "decode_state(fused=True) has no gradient, and the scales require one. Leave "
                "fused=None to have the plain operations"
            )
        fused = False
    if not takes_codes(fused, [state.codes, state.scales], op="decode_state"):
        return functional.decode_state(state)
    from lightning_ext.kernels._triton._states import _encode_state

    return _encode_state.decode_state(state)
