"""How each format of optimizer states makes codes and scales of a tensor, and numbers of them.

Every format has a function for some consecutive rows, so that work stays in a core's cache:
blocks of the flattened tensor, or the rows of its matrix where scales have rank 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_ext.functional._states._code_books import (
    E4M3_LOGARITHMS,
    E4M3_MAX,
    nearest_codes,
    numbers_of,
    once,
)

SMALLEST = 2.0**-126  # a scale; below it 1/scale may be infinite, and 0 is taken
RANGE = math.log2(E4M3_MAX**2 / 2)  # to which the range of a group is stretched, in octaves
# Ties are frequent among numbers of few bits: they are to be rounded up, and not as the errors of
# logarithms have it.
TOP = E4M3_MAX * (1 + 2.0**-17)
POWER_STEP = 1 / 8
POWER_MAX = 16.0
_POWERS = round(POWER_MAX / POWER_STEP) + 1
_TILE = 1 << 16  # entries whose intermediate results stay in a core's cache


def spans(rows: int, width: int) -> Iterator[slice]:
    """Split rows into parts that are worked on one after the other, with an even number of rows."""
    part = max(_TILE // width & ~1, 2)
    if torch.compiler.is_compiling():  # which fuses the operations itself
        part = max(rows, 1)
    for start in range(0, rows, part):
        yield slice(start, min(start + part, rows))


def as_rows(flat: Tensor, width: int) -> Tensor:
    """Return shape (⌈n/width⌉, width), the last row filled up with zeros."""
    missing = -flat.numel() % width
    padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
    return padded.view(padded.numel() // width, width)


def largest(x: Tensor, dim: int) -> Tensor:
    """Return max |x| as a scale: 0 where it is no normal number, infinite where there is a nan."""
    found = x.abs().amax(dim)
    found = torch.where(found.isnan(), math.inf, found)
    return torch.where(found < SMALLEST, 0.0, found)


def encode_dynamic(rows: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (uint8, the shape of rows) and scales (one a row).

    A second moment above 0 has no code of 0, by whose root a later step would be divided.
    """
    scales = largest(rows, 1)
    shares = rows * _inverse(scales)[:, None]
    codes = nearest_codes(shares, bits, signed)
    return codes if signed else codes.maximum((shares > 0).to(codes.dtype)), scales


def decode_dynamic(codes: Tensor, scales: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the numbers of codes, shape (rows, width)."""
    return numbers_of(codes, bits, signed, scales.dtype).view(codes.shape) * scales[:, None]


def encode_expanded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes (uint8, the shape of rows) and for each row its maximum and its power."""
    size = rows.abs()
    most = largest(size, 1)
    power = _power(most, _least(size))
    shares = size.mul_(_inverse(most)[:, None])
    stretched = shares.log2_().mul_(power[:, None]).exp2_().mul_(TOP)
    codes = stretched.copysign_(rows).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, torch.stack([most, power], dim=1)


def decode_expanded(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of codes, shape (rows, width)."""
    if _is_looked_up(scales):
        steps = (scales[:, 1:] / POWER_STEP).nan_to_num_(0.0).clamp_(0, _POWERS - 1)
        place = codes + steps.int().mul_(256)
        share = _expanded_shares(scales.device).index_select(0, place.view(-1))
        return share.view(codes.shape).mul_(scales[:, :1])
    table = torch.tensor(E4M3_LOGARITHMS, dtype=scales.dtype, device=scales.device)
    return _expanded(table, codes, scales[:, 1:]) * scales[:, :1]


def _is_looked_up(scales: Tensor) -> bool:
    """Whether there is no gradient by scales, no compiler, and a table in their dtype."""
    by_scales = scales.requires_grad and torch.is_grad_enabled()
    return scales.dtype == torch.float32 and not (by_scales or torch.compiler.is_compiling())


@once
def _expanded_shares(device: torch.device) -> Tensor:
    """What all codes stand for by each multiple of ``POWER_STEP``, nan by 0; flat."""
    powers = torch.arange(_POWERS, dtype=torch.float32)[:, None] * POWER_STEP
    powers[0] = math.nan
    codes = torch.arange(256, dtype=torch.uint8).expand(_POWERS, 256)
    return _expanded(torch.tensor(E4M3_LOGARITHMS), codes, powers).view(-1).to(device)


def _expanded(logarithms: Tensor, codes: Tensor, powers: Tensor) -> Tensor:
    """Return what codes stand for as shares of their scales."""
    flat = codes.reshape(-1).int()
    size = (logarithms.index_select(0, flat).view(codes.shape) * (1 / powers)).exp2()
    return size * (1 - (flat >> 7) * 2).view(codes.shape)


def encode_rank_one(rows: Tensor, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    """Return codes, int32: of the nearest (code + 1)/16 of the scale, ties to the lower."""
    scales = torch.minimum(row_scales[:, None], column_scales)
    shares = rows / scales.masked_fill(scales == 0, 1.0)
    return (shares * 16 - 1.5).ceil_().clamp_(0, 15).int()


def decode_rank_one(codes: Tensor, row_scales: Tensor, column_scales: Tensor) -> Tensor:
    """Return the numbers of codes, shape (rows, width)."""
    scales = torch.minimum(row_scales[:, None], column_scales)
    return (codes + 1).to(scales.dtype).mul_(1 / 16) * scales


def rank_one_scales(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maxima of the rows and of the columns."""
    columns = rows.new_zeros(rows.shape[1])
    maxima = []
    for span in spans(*rows.shape):
        maxima.append(largest(rows[span], 1))
        columns = torch.maximum(columns, largest(rows[span], 0))
    return (torch.cat(maxima) if maxima else rows.new_zeros(0)), columns


def pack(codes: Tensor) -> Tensor:
    """Return two codes a byte, the first of them in its low bits; shape (⌈n/2⌉,)."""
    pairs = as_rows(codes.reshape(-1).to(torch.uint8) & 15, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Return the codes of bytes, twice as many; uint8."""
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, 1 / scales, 0.0)


def _least(size: Tensor) -> Tensor:
    """Return the least number above 0 of each row."""
    kind = torch.int32 if size.dtype == torch.float32 else torch.int64
    # Less 1, the bits of 0 are those of the largest integer, but for the sign.
    return (
        (size.view(kind) - 1).bitwise_and_(torch.iinfo(kind).max).amin(1).add_(1).view(size.dtype)
    )


def _power(most: Tensor, least: Tensor) -> Tensor:
    """The largest multiple of 1/8 that stretches [least, most] to no more than the range."""
    octaves = (most / least).log2()
    steps = (RANGE / POWER_STEP / octaves.clamp_min(RANGE / POWER_MAX)).floor()
    return torch.where(most > 0, steps.clamp_min(1) * POWER_STEP, 1.0)
