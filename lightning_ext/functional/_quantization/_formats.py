"""What the formats of block quantization are made of, and which blocks they take.

Source: OCP Microscaling Formats (MX) v1.0; Rouhani et al. 2023, arXiv:2310.10537, for
    those that begin with "mx"; OCP 8-bit floating point (OFP8) v1.0 for E4M3 and E5M2.
Differs: MXINT8 leaves −128 unused, so that it is symmetric; the codes of FP6 take a byte each.
"""

from __future__ import annotations

from typing import NamedTuple

MX_BLOCK = 32
_DEFAULT_BLOCK = 256
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 4096


class Format(NamedTuple):
    """One format of codes.

    Attributes:
        bits: that a code takes in memory, 8 or 4.
        mantissa_bits: of a floating point code; 0 for integers.
        exponent_bits: of a floating point code; 0 for integers.
        bias: of the exponent.
        largest: the largest magnitude, as a code.
        largest_value: and as a number.
        shared_exponent: whether the scale of a block is a power of two, kept as E8M0.
    """

    bits: int
    mantissa_bits: int
    exponent_bits: int
    bias: int
    largest: int
    largest_value: float
    shared_exponent: bool

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return self.exponent_bits == 0

    @property
    def largest_exponent(self) -> int:
        """⌊log₂⌋ of the largest number."""
        return 0 if self.is_integer else (self.largest >> self.mantissa_bits) - self.bias


FORMATS = {
    "int8": Format(8, 0, 0, 0, 127, 127.0, False),
    "int4": Format(4, 0, 0, 0, 7, 7.0, False),
    "fp8_e4m3": Format(8, 3, 4, 7, 0x7E, 448.0, False),
    "fp8_e5m2": Format(8, 2, 5, 15, 0x7B, 57344.0, False),
    "mxint8": Format(8, 0, 0, 0, 127, 127 / 64, True),
    "mxfp8_e4m3": Format(8, 3, 4, 7, 0x7E, 448.0, True),
    "mxfp8_e5m2": Format(8, 2, 5, 15, 0x7B, 57344.0, True),
    "mxfp6_e2m3": Format(8, 3, 2, 1, 0x1F, 7.5, True),
    "mxfp6_e3m2": Format(8, 2, 3, 3, 0x1F, 28.0, True),
    "mxfp4_e2m1": Format(4, 1, 2, 1, 0x07, 6.0, True),
}


def check_format(format: str, block_size: int | None, symmetric: bool) -> tuple[Format, int]:
    """Return a format and its block size, or refuse them.

    Args:
        format: a key of ``FORMATS``.
        block_size: entries of a block; the format's own where None.
        symmetric: whether blocks have no shift.

    Raises:
        TypeError: if the block size is no integer.
        ValueError: for an unknown format, a block it does not take, or a shift it does not have.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not allowed; choose one of {', '.join(FORMATS)}")
    if block_size is not None and not isinstance(block_size, int):
        raise TypeError(f"block_size={block_size!r} is not allowed; give an integer, such as 64")
    found = FORMATS[format]
    if not symmetric and (not found.is_integer or found.shared_exponent):
        raise ValueError(f"symmetric=False is not for {format!r}, but for 'int8' and 'int4'")
    if found.shared_exponent:
        if block_size not in (None, MX_BLOCK):
            raise ValueError(f"block_size={block_size} is not allowed for {format!r}; it has 32")
        return found, MX_BLOCK
    size = _DEFAULT_BLOCK if block_size is None else block_size
    if not _SMALLEST_BLOCK <= size <= _LARGEST_BLOCK or size & (size - 1):
        raise ValueError(
            f"block_size={size} is not allowed; it must be a power of two from {_SMALLEST_BLOCK} "
            f"to {_LARGEST_BLOCK}. A block may be longer than what it holds"
        )
    return found, size
