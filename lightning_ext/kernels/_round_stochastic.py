"""Stochastic rounding to bfloat16 in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._quantization._random_bits import check_counter
from lightning_ext.functional._quantization._round_stochastic import check_rounded
from lightning_ext.kernels._fused import use_triton


def round_stochastic(
    x: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    fused: bool | None = None,
) -> Tensor:
    """Return x rounded to one of its two neighbours in bfloat16, the mean of which is x.

    The bits of the result are those of ``functional.round_stochastic`` on any device.

    Args:
        x: float32 of any shape; other real dtypes are converted to it first.
        dtype: ``torch.bfloat16``.
        seed: 64 bits.
        step: 32 bits, the optimizer step for instance.
        stream: 32 bits, the rank for instance.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        The shape of x, in ``dtype``.

    Raises:
        TypeError: if x is complex, or with ``fused=True`` of a dtype that kernels do not take.
        ValueError: if ``dtype`` is another one, or seed, step or stream do not fit.
    """
    check_rounded(x, dtype)
    check_counter(seed, step, stream)
    if not use_triton(fused, [x], op="round_stochastic"):
        return functional.round_stochastic(x, dtype, seed=seed, step=step, stream=stream)
    from lightning_ext.kernels._triton._quantization import _round_stochastic

    return _round_stochastic.round_stochastic(x.detach(), seed=seed, step=step, stream=stream)
