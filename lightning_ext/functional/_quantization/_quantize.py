"""Numbers as short codes with a scale for each block of them.

Source: Wang et al. 2023 (ZeRO++, arXiv:2306.10209) for integers in blocks; Rouhani et al. 2023
    (arXiv:2310.10537) and OCP Microscaling Formats (MX) v1.0 for "mx" formats; Pan et al. 2021
    (Mesa, arXiv:2111.11124) for the asymmetric ones.
Differs: blocks lie within rows and the last one of a row may be short; the scale of a block is its
    own, no running mean; a block that is not finite becomes nan, so that overflow is seen behind a
    collective; rounding at random draws its bits from a counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain
from lightning_ext.functional._quantization._formats import Format, check_format
from lightning_ext.functional._quantization._minifloat import (
    encode_minifloat,
    power_of_two,
    round_units,
)
from lightning_ext.functional._quantization._quantized import (
    NOT_FINITE,
    Quantized,
    for_entries,
    in_blocks,
)
from lightning_ext.functional._quantization._random_bits import check_counter, random_bits, tile_of
from lightning_ext.functional._widen import widen

_TILE = 1 << 16  # entries
SMALLEST_SCALE = 2.0**-126  # its inverse is a float32, too


def quantize(
    x: Tensor,
    format: str,
    *,
    block_size: int | None = None,
    symmetric: bool = True,
    seed: int | None = None,
    step: int = 0,
    stream: int = 0,
) -> Quantized:
    """Return x as codes with a scale for each block of consecutive entries of its last axis.

        int8, int4     q = round(x/s),        s = max|x| / (2^(bits−1) − 1)
        asymmetric     q = round((x − z)/s),  s = (max x − z) / (2^bits − 1),  z = min x
        fp8_…          q = round_to_format(x/s),  s = max|x| / (largest number of the format)
        mx…            q = round_to_format(x/s),  s = 2^(⌊log₂ max|x|⌋ − ⌊log₂ largest number⌋)

    The error is at most half a step (with ``seed`` less than one), s for integers and s times the
    spacing of the format's numbers for others; only in "mx" formats numbers beyond the largest one
    are saturated. Scales are at least 2⁻¹²⁶, which is the step of blocks below. Arithmetic is in
    ``torch.promote_types(x.dtype, torch.float32)``. A block that holds inf or nan, or whose range
    overflows, has scale nan and codes 0, and reads as nan. There is no gradient.

    Args:
        x: real floats, shape (…, length), at least one axis: a row for each destination, for
            instance. Each row has blocks of its own.
        format: "int8", "int4", "fp8_e4m3", "fp8_e5m2", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2",
            "mxfp6_e3m2", "mxfp6_e2m3" or "mxfp4_e2m1".
        block_size: entries of a block, a power of two from 16 to 4096; default 32 in "mx" formats,
            which have no other, 256 in the rest. The last block of a row may be short.
        symmetric: without shifts; ``False`` for "int8" and "int4" alone.
        seed: rounds up or down at random, so that the mean is x, by ``random_bits``: entry j of the
            k-th of all blocks takes word k · block_size + j. To nearest, even, where ``None``.
        step: of those bits, for instance of the optimizer.
        stream: of those bits, for instance the rank.

    Returns:
        Codes, scales and shifts.

    Raises:
        TypeError: if x is not of real floats or is a DTensor, or the block size no integer.
        ValueError: if x has no axis, or format, block and shift do not fit together.

    Example:
        >>> found = quantize(torch.tensor([127.0, -3.4, 0.5, 1.5]), "int8", block_size=16)
        >>> found.codes.view(torch.int8).tolist(), found.scales.tolist(), found.nbytes
        ([127, -3, 0, 2], [1.0], 8)
    """
    check_quantized_input(x)
    kind, size = check_format(format, block_size, symmetric)
    check_counter(seed or 0, step, stream)
    blocks = in_blocks(widen(x.detach()), size)
    flat = blocks.flatten(0, -2)
    tile = tile_of(len(flat), max(1, _TILE // size), x.device)
    parts = []
    for start, part in zip(range(0, max(len(flat), 1), tile), flat.split(tile), strict=True):
        noise = None if seed is None else _noise(part, start * size, seed, step, stream)
        parts.append(_encoded(part, kind, symmetric, noise))
    codes, scales, shifts = (torch.cat(found) for found in zip(*parts, strict=True))
    rows = blocks.shape[:-1]
    codes = codes.view(blocks.shape).flatten(-2)[..., : x.shape[-1]]
    codes = _pack(codes) if kind.bits == 4 else codes.contiguous()
    kept = None if symmetric else shifts.view(rows)
    return Quantized(codes, scales.view(rows), kept, format, size, x.shape[-1])


def check_quantized_input(x: Tensor) -> None:
    """Refuse what has no blocks.

    Args:
        x: real floats with an axis.

    Raises:
        TypeError: if x is not of real floats, or is a DTensor.
        ValueError: if x has no axis.
    """
    check_plain(x=x)
    if not x.is_floating_point():
        raise TypeError(f"x is of {x.dtype}; quantize takes real floating point numbers")
    if x.ndim == 0:
        raise ValueError("x has no axis to lay blocks along; give x.view(1)")


def _noise(blocks: Tensor, offset: int, seed: int, step: int, stream: int) -> Tensor:
    """The high 24 bits of a word for each entry, as ``round_units`` takes them."""
    words = random_bits(
        blocks.numel(), seed=seed, step=step, stream=stream, offset=offset, device=blocks.device
    )
    return (words >> 8).to(torch.float32).view(blocks.shape)


def _encoded(
    blocks: Tensor, kind: Format, symmetric: bool, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and shifts (empty where there are none) of blocks, (n, size)."""
    shifts = blocks.new_empty(0)
    if kind.shared_exponent:
        codes, scales, finite = _shared_exponents(blocks, kind, noise)
    elif symmetric:
        codes, scales, finite = _scaled(blocks, kind, noise)
    else:
        codes, scales, shifts, finite = _shifted(blocks, kind, noise)
    return codes.mul_(for_entries(finite, blocks.shape[-1])), scales, shifts


def _largest(blocks: Tensor) -> Tensor:
    return torch.maximum(blocks.amax(-1), -blocks.amin(-1))


def _floored(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales that have an inverse, nan where they are not finite, and whether they are."""
    finite = scales.isfinite()
    return torch.where(finite, scales.clamp_min(SMALLEST_SCALE), torch.nan), finite


def _integers(units: Tensor, noise: Tensor | None, low: int, high: int) -> Tensor:
    return round_units(units, noise).clamp_(low, high).to(torch.int16).to(torch.uint8)


def _scaled(blocks: Tensor, kind: Format, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and which blocks are finite."""
    scales, finite = _floored(_largest(blocks) / kind.largest_value)
    units = blocks * for_entries(scales.reciprocal(), blocks.shape[-1])
    if kind.is_integer:
        return _integers(units, noise, -kind.largest, kind.largest), scales, finite
    return encode_minifloat(units.to(torch.float32), kind, noise), scales, finite


def _shifted(
    blocks: Tensor, kind: Format, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, shifts, and which blocks are finite."""
    low, levels = blocks.amin(-1), 2**kind.bits - 1
    scales, finite = _floored((blocks.amax(-1) - low) / levels)
    size = blocks.shape[-1]
    units = (blocks - for_entries(low, size)).mul_(for_entries(scales.reciprocal(), size))
    return _integers(units, noise, 0, levels), scales, torch.where(finite, low, 0), finite


def _shared_exponents(
    blocks: Tensor, kind: Format, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, E8M0 scales, and which blocks are finite."""
    field = _largest(blocks).to(torch.float32).view(torch.int32) >> 23 & 255
    finite = field < 255
    field = (field - kind.largest_exponent).clamp_(min=0)
    inverses = power_of_two((254 - field).clamp_(min=0))
    units = blocks * for_entries(inverses, blocks.shape[-1])
    scales = torch.where(finite, field, NOT_FINITE).to(torch.uint8)
    if kind.is_integer:
        return _integers(units.mul_(64), noise, -kind.largest, kind.largest), scales, finite
    return encode_minifloat(units.to(torch.float32), kind, noise), scales, finite


def _pack(codes: Tensor) -> Tensor:
    """Two codes to a byte, the first one in its low half."""
    if codes.shape[-1] % 2:
        codes = torch.cat([codes, torch.zeros_like(codes[..., :1])], dim=-1)
    pairs = codes.unflatten(-1, (codes.shape[-1] // 2, 2))
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)
