"""Signs, eight to a byte, and what many ranks' signs come to, in one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._quantization._signs import (
    check_ballots,
    check_packable,
    check_packed,
    check_signed_dtype,
    check_votes,
)
from lightning_ext.kernels._fused import takes_codes


def pack_signs(x: Tensor, *, fused: bool | None = None) -> Tensor:
    """Return the signs of x along its last axis, eight to a byte.

    Bit i mod 8 of byte ⌊i/8⌋ is set where x_i < 0: zeros of either sign and nan count as positive.

    Args:
        x: real numbers, shape (…, length), at least one axis.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        uint8, shape (…, ⌈length/8⌉); the bits that are left of the last byte are 0.

    Raises:
        TypeError: if x is complex.
        ValueError: if x has no axis.
    """
    check_packable(x)
    if not takes_codes(fused, [x], op="pack_signs"):
        return functional.pack_signs(x)
    from lightning_ext.kernels._triton._quantization import _signs

    return _signs.pack_signs(x.detach())


def unpack_signs(
    packed: Tensor,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool | None = None,
) -> Tensor:
    """Return −1 where a bit is set and +1 where it is not.

    Args:
        packed: uint8, shape (…, ⌈length/8⌉).
        length: entries of a row.
        dtype: of the result, one that has −1.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (…, length).

    Raises:
        TypeError: for a dtype without −1.
        ValueError: if there are not ⌈length/8⌉ bytes.
    """
    check_packed(packed, length)
    check_signed_dtype(dtype)
    if not takes_codes(fused, [packed, _of(dtype, packed)], op="unpack_signs"):
        return functional.unpack_signs(packed, length, dtype=dtype)
    from lightning_ext.kernels._triton._quantization import _signs

    return _signs.unpack_votes(packed.unsqueeze(-2), length, dtype)


def unpack_votes(
    votes: Tensor,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool | None = None,
) -> Tensor:
    """Return −1, 0 or +1 for what ``majority_vote`` has packed.

    Args:
        votes: uint8, shape (…, planes, ⌈length/8⌉), one or two planes.
        length: entries of a row.
        dtype: of the result, one that has −1.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (…, length).

    Raises:
        TypeError: for a dtype without −1.
        ValueError: if there are not one or two planes of ⌈length/8⌉ bytes.
    """
    check_votes(votes)
    check_packed(votes, length)
    check_signed_dtype(dtype)
    if not takes_codes(fused, [votes, _of(dtype, votes)], op="unpack_votes"):
        return functional.unpack_votes(votes, length, dtype=dtype)
    from lightning_ext.kernels._triton._quantization import _signs

    return _signs.unpack_votes(votes, length, dtype)


def sum_signs(packed: Tensor, length: int, *, fused: bool | None = None) -> Tensor:
    """Return the sum over ranks of their signs, Σ_r sign_r.

    Args:
        packed: uint8, shape (ranks, …, ⌈length/8⌉), at most 32,767 ranks.
        length: entries of a row.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape (…, length), int8 up to 127 ranks, int16 beyond.

    Raises:
        ValueError: if there are no ranks or too many, or not ⌈length/8⌉ bytes.
    """
    check_ballots(packed)
    check_packed(packed, length)
    if not takes_codes(fused, [packed], op="sum_signs"):
        return functional.sum_signs(packed, length)
    from lightning_ext.kernels._triton._quantization import _signs

    return _signs.sum_signs(packed, length)


def majority_vote(packed: Tensor, *, fused: bool | None = None) -> Tensor:
    """Return the sign that most ranks have, packed again; a tie is 0.

    Args:
        packed: uint8, shape (ranks, …, bytes), what ``pack_signs`` made on each rank.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        uint8, shape (…, planes, bytes): signs, and for an even number of ranks a second plane in
        which the ties are set. ``unpack_votes`` reads both.

    Raises:
        ValueError: if there are no ranks or too many.
    """
    check_ballots(packed)
    if not takes_codes(fused, [packed], op="majority_vote"):
        return functional.majority_vote(packed)
    from lightning_ext.kernels._triton._quantization import _signs

    return _signs.majority_vote(packed)


def _of(dtype: torch.dtype, like: Tensor) -> Tensor:
    """Nothing, in the dtype and on the device of a result."""
    return torch.empty(0, dtype=dtype, device=like.device)
