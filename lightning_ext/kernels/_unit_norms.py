"""Norms of the units of weights and gradients in one launch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._unit_norms import unit_shape
from lightning_ext.kernels._fused import use_triton
from lightning_ext.kernels._recomputed_gradient import with_gradient


def unit_norms(tensors: Sequence[Tensor], *, fused: bool | None = None) -> list[Tensor]:
    """Return the Euclidean norm of every unit of every tensor.

    A unit is a row of a matrix, a filter x[i] of a convolution's weight, and a whole vector. The
    kernel sums up in float32, in a fixed order.

    Args:
        tensors: of any shapes, on one device.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        For each tensor its norms in a shape that broadcasts against it: (n, 1, …, 1) with n units,
        all ones for a vector.

    Example:
        >>> unit_norms([torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])])
        [tensor([[5.],
                [1.]]), tensor([1.])]
    """
    if not (tensors and use_triton(fused, tensors, op="unit_norms")):
        return functional.unit_norms(tensors)
    from lightning_ext.kernels._triton import _unit_norms as triton

    shapes = [unit_shape(x) for x in tensors]
    found = with_gradient(lambda xs: triton.unit_norms(xs, shapes), functional.unit_norms, tensors)
    return list(found)
