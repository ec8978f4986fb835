"""Codes with the scales of their blocks, what they stand for and how many bytes they take.

Source: OCP Microscaling Formats (MX) v1.0, for scales that are powers of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain
from lightning_ext.functional._quantization._formats import FORMATS, Format, check_format
from lightning_ext.functional._quantization._minifloat import decode_minifloat, power_of_two
from lightning_ext.scaling import block_bytes

NOT_FINITE = 255  # as an E8M0 scale


class Quantized(NamedTuple):
    """Codes of a tensor and what is needed to read them; rows may be gathered or sliced.

    Attributes:
        codes: uint8; shape (…, length), or (…, ⌈length/2⌉) where two 4-bit codes share a byte, the
            first one in its low half. Integers are in two's complement, without sign where there
            are shifts.
        scales: of the blocks of each row, shape (…, ⌈length/block_size⌉); float32, of float64
            input float64, and uint8 (E8M0) in "mx" formats.
        shifts: what code 0 stands for, of the shape and dtype of scales; ``None`` for 0.
        format: the codes' format.
        block_size: entries that share a scale.
        length: entries of a row.
    """

    codes: Tensor
    scales: Tensor
    shifts: Tensor | None
    format: str
    block_size: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and shifts."""
        tensors = (self.codes, self.scales, self.shifts)
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that the codes stand for."""
        return torch.Size([*self.codes.shape[:-1], self.length])


def dequantize(quantized: Quantized, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers that codes stand for: s·q, or z + s·q where there are shifts.

    Args:
        quantized: what ``quantize`` returned; its rows may have been gathered or sliced.
        dtype: of the result, a floating point one; by default that of the scales, float32 in "mx"
            formats.

    Returns:
        Shape (…, length). It has gradients for scales and shifts.

    Raises:
        TypeError: if ``dtype`` is not of real floats, or the block size no integer.
        ValueError: if shapes or devices do not fit together.

    Example:
        >>> codes = torch.tensor([1, 253], dtype=torch.uint8)
        >>> dequantize(Quantized(codes, torch.tensor([0.5]), None, "int8", 256, 2))
        tensor([ 0.5000, -1.5000])
    """
    check_quantized(quantized)
    check_float_dtype(dtype)
    kind, size = FORMATS[quantized.format], quantized.block_size
    scales = _scale_values(quantized.scales) if kind.shared_exponent else quantized.scales
    values = _values(quantized, kind).to(scales.dtype)
    blocks = in_blocks(values, size) * for_entries(scales, size)
    if quantized.shifts is not None:
        blocks = blocks + for_entries(quantized.shifts, size)
    out = blocks.flatten(-2)[..., : quantized.length]
    return out.to(dtype or scales.dtype).contiguous()


def quantized_bytes(
    length: int, format: str, *, block_size: int | None = None, symmetric: bool = True
) -> int:
    """Return the bytes of a quantized float32 row: ``Quantized.nbytes`` before there is one.

    Args:
        length: entries of the row.
        format: as in ``quantize``.
        block_size: as in ``quantize``.
        symmetric: as in ``quantize``.

    Raises:
        ValueError: if format, block and shift do not fit together.

    Example:
        >>> quantized_bytes(1000, "int4"), quantized_bytes(1000, "mxfp4_e2m1")
        (516, 532)
    """
    kind, size = check_format(format, block_size, symmetric)
    scale_bytes = 1 if kind.shared_exponent else 4 if symmetric else 8
    return block_bytes(length, bits=kind.bits, block_size=size, scale_bytes=scale_bytes)


def check_quantized(quantized: Quantized) -> Format:
    """Return the format of codes whose shapes fit together.

    Args:
        quantized: codes, scales and shifts.

    Raises:
        TypeError: if the block size is no integer, or one of them is a DTensor.
        ValueError: if they do not fit, or are on several devices.
    """
    codes, scales, shifts, name, block_size, length = quantized
    check_plain(codes=codes, scales=scales, shifts=shifts)
    kind, size = check_format(name, block_size, shifts is None)
    rows = codes.shape[:-1]
    wanted = torch.Size([*rows, length if kind.bits == 8 else -(-length // 2)])
    if codes.dtype != torch.uint8 or codes.shape != wanted:
        raise ValueError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}; for length={length} in "
            f"{name!r} they must be torch.uint8 of shape {tuple(wanted)}"
        )
    wanted = torch.Size([*rows, -(-length // size)])
    for part, found in (("scales", scales), ("shifts", shifts)):
        if found is not None and found.shape != wanted:
            raise ValueError(
                f"{part} have shape {tuple(found.shape)}; for codes of shape {tuple(codes.shape)} "
                f"in blocks of {size} it must be {tuple(wanted)}"
            )
        if found is not None and found.device != codes.device:
            raise ValueError(
                f"{part} are on {found.device}, codes on {codes.device}; they must be on one device"
            )
    return kind


def check_float_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that does not hold what scaled codes stand for.

    Args:
        dtype: of a result; ``None`` for its default.

    Raises:
        TypeError: if it is not of real floats.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(
            f"dtype={dtype} is not allowed; it must be a real floating dtype, as a code times its "
            "scale is no integer"
        )


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Return rows as blocks, shape (…, ⌈length/size⌉, size).

    Args:
        x: rows, shape (…, length).
        size: entries of a block; a short one is filled up with its last entry.
    """
    missing = -x.shape[-1] % size
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def for_entries(per_block: Tensor, size: int) -> Tensor:
    """Return what blocks have, shape (…, blocks), in a shape that broadcasts over their entries.

    Args:
        per_block: scales, for instance.
        size: entries of a block.
    """
    if not torch.compiler.is_compiling():
        return per_block.unsqueeze(-1)
    # Of x_j · s[j // size] TorchInductor (torch 2.13) splits the loop over j by size on a CPU, and
    # leaves out a short last block: its entries are what was in memory. It sees no division here.
    blocks = per_block.shape[-1]
    index = torch.arange(blocks * size, device=per_block.device) >> size.bit_length() - 1
    return per_block.index_select(-1, index).unflatten(-1, (blocks, size))


def _scale_values(scales: Tensor) -> Tensor:
    field = scales.to(torch.int32)
    return torch.where(field < NOT_FINITE, power_of_two(field.clamp(max=254)), torch.nan)


def _values(quantized: Quantized, kind: Format) -> Tensor:
    """The numbers of the codes in units of their scales."""
    codes, length = quantized.codes, quantized.length
    if kind.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :length]
    if not kind.is_integer:
        return decode_minifloat(codes, kind)
    if quantized.shifts is not None:
        return codes
    if kind.bits == 4:
        return (codes ^ 8).to(torch.int8) - 8
    return codes.view(torch.int8) / 64 if kind.shared_exponent else codes.view(torch.int8)
