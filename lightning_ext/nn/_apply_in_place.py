"""Weights of 8 bits that change device and dtype in place, as other parameters do.

Differs: for subclasses of tensors torch swaps objects instead, which fails while a graph, DDP or a
    weak reference has them, and hides the error that a run ends with when Lightning cleans up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ext.nn._int8_weight import Int8Weight


def apply_in_place(weight: Int8Weight, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply what ``torch.nn.Module._apply`` was called with to a parameter and its gradient.

    Args:
        weight: the parameter.
        fn: moves a tensor, converts it, or makes one like it.

    Returns:
        The parameter, or a new one where torch makes new ones of floats, too: at "meta", and with
        ``torch.__future__.set_overwrite_module_params_on_conversion``.
    """
    with torch.no_grad():
        found = fn(weight)
        grad = None if weight.grad is None else fn(weight.grad)
        if not isinstance(found, Int8Weight):  # of to_empty
            found = Int8Weight.of(found, block_size=weight.block_size)
        if found is weight or _fits(weight, found):
            return _changed(weight, found, grad)
    param = nn.Parameter(found, weight.requires_grad)
    param.grad = grad
    return param


def _fits(weight: Int8Weight, found: Int8Weight) -> bool:
    """Whether the object can go on with the device and dtype of another one."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    return not overwrite and torch._has_compatible_shallow_copy_type(weight, found)


def _changed(weight: Int8Weight, found: Int8Weight, grad: Tensor | None) -> Int8Weight:
    """The same objects, weight and gradient, with what was found."""
    if found is not weight:
        weight.data = found
        weight.codes, weight.scales, weight.shifts = found.codes, found.scales, found.shifts
    if grad is not None and weight.grad is not None and grad is not weight.grad:
        weight.grad.data = grad
    return weight
