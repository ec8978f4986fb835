"""Weights of 24 bits: a bfloat16 to compute with, and a byte that says what its rounding took away.

Source: FlashOptim, weights as bfloat16 and an int8 of (w − bfloat16(w)) in units of half a place.
Differs: the units are 1/256 of a place, counted on the bits, where the next number has another
    exponent, too; so every pair is one number of 24 bits, and the rounding of a float32 to it the
    only loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_QUIET = 0x7FC00000


def split_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bfloat16 nearest to w and its error e, which make w up to 2⁻¹⁶ |w|.

        u = bits(w) to 24 bits,  bits(bfloat16) = ⌊(u + 128)/256⌋,  e = u − 256·bits(bfloat16)

    Rounding to u is to nearest, ties to even. It keeps the order of numbers, and so does
    ``join_weight`` of what it makes. It has no gradient.

    Args:
        weight: w, float32 of any shape; other real dtypes are converted to it first.

    Returns:
        Two tensors of the shape of w: bfloat16, and int8 in [−128, 127].

    Example:
        >>> rounded, errors = split_weight(torch.tensor([1.0, 1.001, -3.0]))
        >>> rounded.tolist(), errors.tolist(), join_weight(rounded, errors)[1].item()
        ([1.0, 1.0, -3.0], [0, 33, 0], 1.001007080078125)
    """
    bits = weight.detach().to(torch.float32).contiguous().view(torch.int32)
    # With its payload a nan could be carried over into another number.
    bits = torch.where((bits & _MAGNITUDE) > _INFINITY, _QUIET, bits)
    short = (bits + 127 + ((bits >> 8) & 1)) >> 8
    high = (short + 128) >> 8
    return high.to(torch.int16).view(torch.bfloat16), (short - (high << 8)).to(torch.int8)


def join_weight(rounded: Tensor, errors: Tensor) -> Tensor:
    """Return the weights that ``split_weight`` has split.

        bits(w) = 65536·bits(bfloat16) + 256·e

    Args:
        rounded: bfloat16 of any shape.
        errors: e, int8 of the same shape.

    Returns:
        float32 of that shape.

    Raises:
        TypeError: if the dtypes are others.

    Example:
        >>> join_weight(
        ...     torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([33]).to(torch.int8)
        ... )
        tensor([1.0010])
    """
    if rounded.dtype != torch.bfloat16 or errors.dtype != torch.int8:
        raise TypeError(
            f"weights in {rounded.dtype} with errors in {errors.dtype} are not allowed; they are "
            "torch.bfloat16 and torch.int8, as split_weight makes them"
        )
    bits = rounded.detach().contiguous().view(torch.int16).to(torch.int32)
    return ((bits << 16) + (errors.to(torch.int32) << 8)).view(torch.float32)
