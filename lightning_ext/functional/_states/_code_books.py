"""Code books: the numbers that codes of a few bits stand for, and how the nearest is found.

Source: Dettmers 2016 (arXiv:1511.04561), section 2.1, the dynamic data type; Dettmers et al. 2022
    ("8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861), its unsigned form.
Differs: any number of bits; the nearest number is found by one look-up and one comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cache, wraps
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

T = TypeVar("T")

E4M3_MAX = 448.0
_NOTHING = -float(1 << 20)  # stands for the logarithm of 0: no power that is used makes it a number


def dynamic_map(bits: int, signed: bool) -> tuple[float, ...]:
    """Return the numbers of the dynamic data type, ascending.

        ±10^−e · (0.1 + 0.9 (j + ½)/2^f),  j < 2^f,  e = 0 … bits − 2;  0;  1

    f fraction bits are left after e zeros, the one behind them, and the sign if there is one:
    f = bits − 2 − e with a sign, bits − 1 − e without.
    """
    numbers = [0.0, 1.0]
    for e in range(bits - 1):
        parts = 1 << (bits - 1 - e - signed)
        found = [10.0**-e * (0.1 + 0.9 * (j + 0.5) / parts) for j in range(parts)]
        numbers += [*found, *(-x for x in found)] if signed else found
    return tuple(sorted(numbers))


def _e4m3_logarithm(code: int) -> float:
    field, fraction = code >> 3 & 15, code & 7
    size = math.ldexp(8 + fraction if field else fraction, max(field, 1) - 10)
    return math.log2(size / E4M3_MAX) if size else _NOTHING


# Made once: a compiler that traces what uses them takes them for constants.
MAPS = {book: dynamic_map(*book) for book in ((8, True), (8, False), (4, True))}
MIDDLES = {k: tuple((a + b) / 2 for a, b in pairwise(numbers)) for k, numbers in MAPS.items()}
# log₂(|q|/448) of the 256 codes of E4M3, with a very low number for its zeros.
E4M3_LOGARITHMS = tuple(
    _e4m3_logarithm(code) if code & 0x7F != 0x7F else math.nan for code in range(256)
)


class CodeBook(NamedTuple):
    """A code book on a device.

    Attributes:
        values: what the codes stand for, ascending; shape (n,), float32.
        middles: halfway from each to the next; shape (n − 1,), float32.
        firsts: for the upper 16 bits of a float32, the code of the least number that begins with
            them, at most n − 2; shape (65536,), uint8. A number has this code or the next one.
        bounds: for the same bits, the middle of these two; shape (65536,), float32.
    """

    values: Tensor
    middles: Tensor
    firsts: Tensor
    bounds: Tensor


def nearest_codes(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the codes of the nearest numbers of a dynamic map, uint8; ties to the lower code."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32:
        middles = torch.tensor(MIDDLES[bits, signed], dtype=x.dtype, device=x.device)
        return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)
    book = code_book(bits, signed, x.device)
    flat = x.reshape(-1)
    place = (flat.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    above = flat > book.bounds.index_select(0, place)
    return book.firsts.index_select(0, place).add_(above.view(torch.uint8)).view(x.shape)


def numbers_of(codes: Tensor, bits: int, signed: bool, dtype: torch.dtype) -> Tensor:
    """Return what codes stand for, shape (codes,)."""
    if torch.compiler.is_compiling() or dtype != torch.float32:
        values = torch.tensor(MAPS[bits, signed], dtype=dtype, device=codes.device)
    else:
        values = code_book(bits, signed, codes.device).values
    return values.index_select(0, codes.reshape(-1).int())


def once(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function returns, but not under a dispatch mode, such as that of fake tensors."""
    known = cache(make)

    @wraps(make)
    def find(*arguments: Hashable) -> T:
        return known(*arguments) if _get_current_dispatch_mode() is None else make(*arguments)

    return find


@once
def code_book(bits: int, signed: bool, device: torch.device) -> CodeBook:
    """Return the dynamic map on a device; made once."""
    values, middles = torch.tensor(MAPS[bits, signed]), torch.tensor(MIDDLES[bits, signed])
    pattern = torch.arange(1 << 16, dtype=torch.int32) << 16
    least = torch.where(pattern < 0, pattern | 0xFFFF, pattern).view(torch.float32)
    firsts = torch.bucketize(least, middles).clamp_max(len(middles) - 1)
    book = values, middles, firsts.to(torch.uint8), middles[firsts]
    return CodeBook(*(x.to(device) for x in book))


@once
def e4m3_logarithm_table(device: torch.device) -> Tensor:
    """Return ``E4M3_LOGARITHMS`` on a device, float32; made once."""
    return torch.tensor(E4M3_LOGARITHMS, device=device)
