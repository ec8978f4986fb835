"""Signs as bits, and what many ranks' bits come to.

A program has a tile of K bytes and their 8 K entries, of all rows; FLAT and ``places`` as in
``_code_tiles``, with blocks of 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._quantization._signs import sum_dtype
from lightning_ext.kernels._triton._quantization._code_tiles import (
    is_whole,
    load_tile,
    places,
    store_tile,
)

_BYTES = 256  # of a program


@triton.jit
def gather_bits(bits, K: tl.constexpr):
    """Booleans, (K, 8), as the bits of K bytes."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def spread_bits(found, K: tl.constexpr):
    """K bytes as 0 and 1, int32, (K, 8)."""
    return (found.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1


@triton.jit
def pack_signs_kernel(x, out, length, total, per_row, FLAT: tl.constexpr, K: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * K
    byte = first + tl.arange(0, K)
    whole = is_whole(first, length, FLAT, K, 8)
    offsets, inside = places(first, total, length, per_row, FLAT, K, 8)
    negative = load_tile(x, offsets, inside, whole).to(tl.float32) < 0
    store_tile(out, byte, gather_bits(negative, K), byte < total, whole)


@triton.jit
def unpack_votes_kernel(
    votes,
    out,
    length,
    total,
    per_row,
    PLANES: tl.constexpr,
    FLAT: tl.constexpr,
    K: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * K
    byte = first + tl.arange(0, K)
    present = byte < total
    if PLANES == 2:
        votes += byte // per_row * per_row  # the second plane of the rows before
    signs = 1 - 2 * spread_bits(tl.load(votes + byte, mask=present, other=0), K)
    if PLANES == 2:
        zeros = tl.load(votes + byte + per_row, mask=present, other=0)
        signs *= 1 - spread_bits(zeros, K)
    offsets, inside = places(first, total, length, per_row, FLAT, K, 8)
    whole = is_whole(first, length, FLAT, K, 8)
    store_tile(out, offsets, signs.to(tl.float32).to(out.dtype.element_ty), inside, whole)


@triton.jit
def sum_signs_kernel(
    packed,
    out,
    stride,
    length,
    total,
    per_row,
    RANKS: tl.constexpr,
    VOTE: tl.constexpr,
    FLAT: tl.constexpr,
    K: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * K
    byte = first + tl.arange(0, K)
    present = byte < total
    sums = tl.full((K, 8), RANKS, tl.int32)
    for rank in range(RANKS):
        found = tl.load(packed + tl.cast(rank, tl.int64) * stride + byte, mask=present, other=0)
        sums -= 2 * spread_bits(found, K)
    if VOTE:
        if RANKS % 2 == 0:
            out += byte // per_row * per_row
            tl.store(out + byte + per_row, gather_bits(sums == 0, K), mask=present)
        tl.store(out + byte, gather_bits(sums < 0, K), mask=present)
    else:
        offsets, inside = places(first, total, length, per_row, FLAT, K, 8)
        whole = is_whole(first, length, FLAT, K, 8)
        store_tile(out, offsets, sums.to(out.dtype.element_ty), inside, whole)


def pack_signs(x: Tensor) -> Tensor:
    """Launch ``pack_signs_kernel``; arguments as in ``functional.pack_signs``."""
    length = x.shape[-1]
    out = torch.empty((*x.shape[:-1], -(-length // 8)), dtype=torch.uint8, device=x.device)
    if out.numel():
        pack_signs_kernel[_grid(out.numel())](
            x.contiguous(), out, **_bounds(out, length), K=_BYTES, num_warps=4
        )
    return out


def unpack_votes(votes: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Launch ``unpack_votes_kernel``; arguments as in ``functional.unpack_votes``."""
    out = torch.empty((*votes.shape[:-2], length), dtype=dtype, device=votes.device)
    row = votes.select(-2, 0)
    if row.numel():
        unpack_votes_kernel[_grid(row.numel())](
            votes.contiguous(),
            out,
            **_bounds(row, length),
            PLANES=votes.shape[-2],
            K=_BYTES,
            num_warps=4,
        )
    return out


def sum_signs(packed: Tensor, length: int) -> Tensor:
    """Launch ``sum_signs_kernel``; arguments as in ``functional.sum_signs``."""
    dtype = sum_dtype(len(packed))
    out = torch.empty((*packed.shape[1:-1], length), dtype=dtype, device=packed.device)
    _sum(packed, out, length, vote=False)
    return out


def majority_vote(packed: Tensor) -> Tensor:
    """Launch ``sum_signs_kernel`` for votes; arguments as in ``functional.majority_vote``."""
    planes = 2 - len(packed) % 2
    shape = (*packed.shape[1:-1], planes, packed.shape[-1])
    out = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    _sum(packed, out, 8 * packed.shape[-1], vote=True)
    return out


def _sum(packed: Tensor, out: Tensor, length: int, *, vote: bool) -> None:
    packed = packed.contiguous()
    row = packed[0]
    if row.numel():
        sum_signs_kernel[_grid(row.numel())](
            packed,
            out,
            row.numel(),
            **_bounds(row, length),
            RANKS=len(packed),
            VOTE=vote,
            K=_BYTES,
            num_warps=4,
        )


def _grid(total: int) -> tuple[int]:
    return (triton.cdiv(total, _BYTES),)


def _bounds(packed: Tensor, length: int) -> dict[str, int]:
    """What bounds entries, how many bytes there are, in a row too, and whether rows are flat."""
    rows = packed.shape[:-1].numel()
    flat = rows == 1 or length % 8 == 0
    return {
        "length": rows * length if flat else length,
        "total": packed.numel(),
        "per_row": packed.shape[-1],
        "FLAT": flat,
    }
