"""The nearest codes of numbers, which give numbers of codes back as they were."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_ext import kernels
from lightning_ext.functional import Quantized


def nearest_codes(value: Tensor, block_size: int) -> Quantized:
    """Return codes, scales and shifts, each number rounded to the nearest.

    The largest number of a block is z + 255·s with two roundings, so that the scale that is made of
    it may be off by its last bit. Where the next one, up or down, reads exactly as the numbers,
    these were of codes, and it is theirs.

    Args:
        value: real floats, shape (rows, length).
        block_size: entries that share a scale.
    """
    found = kernels.quantize(value, "int8", block_size=block_size, symmetric=False)
    exact = _exact(found, value)
    for limit in (math.inf, -math.inf):
        scales = torch.nextafter(found.scales, torch.full_like(found.scales, limit))
        better = ~exact & _exact(found._replace(scales=scales), value)
        found = found._replace(scales=torch.where(better, scales, found.scales))
        exact |= better
    return found


def _exact(found: Quantized, value: Tensor) -> Tensor:
    """Whether a block reads as the numbers, (rows, blocks)."""
    same = kernels.dequantize(found) == value
    missing = -value.shape[-1] % found.block_size
    return pad(same, (0, missing), value=True).unflatten(-1, (*found.scales.shape[-1:], -1)).all(-1)
