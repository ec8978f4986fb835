"""Muon's iteration, with half of the symmetric products."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._newton_schulz import check_newton_schulz
from lightning_ext.kernels._fused import DTYPES, use_triton


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Return what ``functional.newton_schulz`` does, which says how.

    The kernel computes the tiles of X Xᵀ and of b A + c A² on and below the diagonal alone. Of
    m × n matrices, m ≤ n, that saves (n + m)/(4 n + 2 m) of all multiplications, 1/3 where m = n
    and at least 1/4, but for the tiles on the diagonal. It has no gradient.

    Args:
        x: shape (…, m, n), real; all matrices in one launch for each product.
        steps: how often, at least 1.
        coefficients: a, b and c.
        eps: the smallest norm that is divided by, above 0.
        dtype: in which X, A and B are kept; ``None``: that of x, on a CPU at least float32.
        fused: ``None``, the kernel on CUDA where no gradient is asked for; ``True``, the kernel or
            an error; ``False``, torch.

    Returns:
        The shape and dtype of x.

    Raises:
        RuntimeError: ``fused=True`` where the kernel cannot run, or for a gradient.
        TypeError: if ``dtype`` is no real floating dtype, or none that the kernel takes.
        ValueError: if x is no matrix, or ``steps``, ``coefficients`` or ``eps`` are out of range.
    """
    check_newton_schulz(x, steps, coefficients, eps, dtype)
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    if fused and wants_gradient:
        raise RuntimeError(
            "newton_schulz(fused=True) has no gradient; detach x, or leave fused=None"
        )
    if fused is None and (wants_gradient or (dtype or x.dtype) not in DTYPES):
        fused = False
    if fused and dtype is not None and dtype not in DTYPES:
        raise TypeError(f"newton_schulz(fused=True) does not take dtype={dtype}")
    if not use_triton(fused, [x], op="newton_schulz"):
        return functional.newton_schulz(
            x, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype
        )
    from lightning_ext.kernels._triton import _newton_schulz

    return _newton_schulz.newton_schulz(
        x, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype
    )
