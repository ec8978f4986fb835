"""Codes and scales as one row of bytes, so that one collective sends both."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional import Quantized, quantized_bytes

FORMATS = ("int8", "int4")


def check_wire_format(format: str, block_size: int, *, name: str = "format") -> None:
    """Refuse what codes with one scale for each block cannot be.

    Args:
        format: of the codes.
        block_size: entries of a block.
        name: of the argument that the format was given by.

    Raises:
        TypeError: if the block size is no integer.
        ValueError: if format or block size are not allowed.
    """
    if format not in FORMATS:
        raise ValueError(f"{name}={format!r} is not allowed; it is 'int8' or 'int4'")
    quantized_bytes(0, format, block_size=block_size)


def pack(quantized: Quantized) -> Tensor:
    """Return rows of codes, each followed by its scales.

    Args:
        quantized: without shifts, shape (…, length); its codes and scales may be any views.

    Returns:
        uint8, shape (…, bytes), contiguous: as many bytes as ``Quantized.nbytes``, in all.
    """
    scales = quantized.scales.contiguous().view(torch.uint8)
    return torch.cat([quantized.codes, scales], dim=-1).contiguous()


def unpack(packed: Tensor, like: Quantized) -> Quantized:
    """Return what was packed.

    Args:
        packed: of ``pack``, shape (…, bytes), maybe with other rows.
        like: what a rank has packed; all of them have the same format and length.
    """
    width = like.codes.shape[-1]
    codes, scales = packed[..., :width], packed[..., width:]
    # Behind codes they lie at odd addresses; there is one for each block, so the copy is short.
    scales = scales.clone(memory_format=torch.contiguous_format).view(like.scales.dtype)
    return like._replace(codes=codes, scales=scales)
