"""Floating point numbers of 8, 6 and 4 bits, by integer arithmetic on those of 32.

Source: OCP 8-bit floating point (OFP8) v1.0 and OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._quantization._formats import Format

_NATIVE = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
_FIELD = 23  # where the exponent of a float32 begins
_BIAS = 127
_DENORMAL = 1 << 22  # 2⁻¹²⁷ as the bits of a float32


def encode_minifloat(x: Tensor, format: Format, noise: Tensor | None) -> Tensor:
    """Return the codes of x, saturated, as uint8 with the sign before exponent and mantissa.

    The magnitude is taken in units of the last place that it has in the format: these are even in
    the exponent's range, and a mantissa that rounding carries over has the next exponent's code.

    Args:
        x: float32, finite.
        format: a floating point format.
        noise: as in ``round_units``.
    """
    native = _NATIVE.get(f"E{format.exponent_bits}M{format.mantissa_bits}")
    if native is not None and noise is None:
        limit = format.largest_value
        return x.clamp(-limit, limit).to(native).view(torch.uint8)
    magnitude = x.abs()
    lowest = _BIAS + 1 - format.bias
    exponent = (magnitude.view(torch.int32) >> _FIELD).clamp_(min=lowest)
    units = magnitude.mul_(power_of_two(2 * _BIAS + format.mantissa_bits - exponent))
    code = (exponent - lowest << format.mantissa_bits) + round_units(units, noise).to(torch.int32)
    code = code.clamp_(max=format.largest)
    sign = torch.signbit(x).to(torch.int32) << format.exponent_bits + format.mantissa_bits
    return (code | sign).to(torch.uint8)


def decode_minifloat(codes: Tensor, format: Format) -> Tensor:
    """Return the numbers of codes that ``encode_minifloat`` made, float32.

    Args:
        codes: uint8.
        format: a floating point format.
    """
    width = format.exponent_bits + format.mantissa_bits
    wide = codes.to(torch.int32)
    bits = (wide & (1 << width) - 1) << _FIELD - format.mantissa_bits
    bits |= wide >> width << 31
    return bits.view(torch.float32).mul_(2.0 ** (_BIAS - format.bias))


def round_units(x: Tensor, noise: Tensor | None) -> Tensor:
    """Return x rounded to integers, and change it.

    Args:
        x: in its widened dtype, |x| < 2²².
        noise: x is rounded up where its fraction, in units of 2⁻²⁴, is above this integer, of 24
            random bits; to nearest, even, where None.
    """
    if noise is None:
        return x.round_()
    down = x.floor()
    return down.add_(x.sub_(down).mul_(1 << 24) > noise)


def power_of_two(field: Tensor) -> Tensor:
    """Return 2^(field − 127), float32, exactly.

    Args:
        field: int32, in [0, 254].
    """
    return torch.where(field > 0, field << _FIELD, _DENORMAL).view(torch.float32)
