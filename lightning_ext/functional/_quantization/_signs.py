"""Signs of numbers, eight to a byte, and what many ranks' signs come to.

Source: Liu et al. 2024 (Distributed Lion, arXiv:2404.00438): one bit up for each parameter; the
    majority (MaVo) or the average (Avg) of the ranks' signs down.
Differs: 0 is sent as +1, since a bit has no room for it; a tie of an even number of ranks is 0, and
    the vote then has a second bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A product with bit i of a byte as its byte i gathers the bits in the highest byte; the other way
# round, a product puts eight copies of a byte side by side, and a mask keeps bit i of the i-th.
_GATHER = sum(1 << 56 - 7 * i for i in range(8))
_COPIES = sum(1 << 8 * i for i in range(8))
_DIAGONAL = sum(1 << 9 * i for i in range(8)) - (1 << 64)  # the highest bit is the sign of int64


def pack_signs(x: Tensor) -> Tensor:
    """Return the signs of x along its last axis, eight to a byte.

    Bit i mod 8 of byte ⌊i/8⌋ is set where x_i < 0: zeros of either sign and nan count as positive.

    Args:
        x: real numbers, shape (…, length), at least one axis.

    Returns:
        uint8, shape (…, ⌈length/8⌉); the bits that are left of the last byte are 0.

    Raises:
        TypeError: if x is complex.
        ValueError: if x has no axis.

    Example:
        >>> pack_signs(torch.tensor([1.0, -2.0, 0.0, -0.5])).tolist()
        [10]
    """
    check_packable(x)
    return pack_bits(x < 0)


def unpack_signs(packed: Tensor, length: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return −1 where a bit is set and +1 where it is not.

    Args:
        packed: uint8, shape (…, ⌈length/8⌉).
        length: entries of a row.
        dtype: of the result, one that has −1.

    Returns:
        Shape (…, length).

    Raises:
        TypeError: for a dtype without −1.
        ValueError: if there are not ⌈length/8⌉ bytes.

    Example:
        >>> unpack_signs(torch.tensor([10], dtype=torch.uint8), 4)
        tensor([ 1., -1.,  1., -1.])
    """
    check_packed(packed, length)
    check_signed_dtype(dtype)
    return (1 - 2 * unpack_bits(packed, length).to(torch.int8)).to(dtype)


def sum_signs(packed: Tensor, length: int) -> Tensor:
    """Return the sum over ranks of their signs, Σ_r sign_r; over the ranks it is the average.

    Args:
        packed: uint8, shape (ranks, …, ⌈length/8⌉), at most 32,767 ranks.
        length: entries of a row.

    Returns:
        Shape (…, length), int8 up to 127 ranks, int16 beyond.

    Raises:
        ValueError: if there are no ranks or too many, or not ⌈length/8⌉ bytes.

    Example:
        >>> sum_signs(torch.tensor([[1], [3], [1]], dtype=torch.uint8), 3).tolist()
        [-3, 1, 3]
    """
    ranks = check_ballots(packed)
    check_packed(packed, length)
    total = torch.full((*packed.shape[1:-1], length), ranks, device=packed.device)
    total = total.to(sum_dtype(ranks))
    for row in packed:
        total = total - 2 * unpack_bits(row, length).to(total.dtype)
    return total


def majority_vote(packed: Tensor) -> Tensor:
    """Return the sign that most ranks have, packed again; a tie is 0.

    Args:
        packed: uint8, shape (ranks, …, bytes), what ``pack_signs`` made on each rank.

    Returns:
        uint8, shape (…, planes, bytes). Plane 0 has the signs. Plane 1, only there for an even
        number of ranks, has a bit set where as many are positive as negative; plane 0 has none
        there. ``unpack_votes`` reads both.

    Raises:
        ValueError: if there are no ranks or too many.

    Example:
        >>> packed = torch.tensor([[0b011], [0b001]], dtype=torch.uint8)
        >>> majority_vote(packed).tolist(), unpack_votes(majority_vote(packed), 3).tolist()
        ([[1], [2]], [-1.0, 0.0, 1.0])
    """
    ranks = check_ballots(packed)
    total = sum_signs(packed, 8 * packed.shape[-1])
    planes = [total < 0] if ranks % 2 else [total < 0, total == 0]
    return torch.stack([pack_bits(plane) for plane in planes], dim=-2)


def unpack_votes(votes: Tensor, length: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return −1, 0 or +1 for what ``majority_vote`` has packed.

    Args:
        votes: uint8, shape (…, planes, ⌈length/8⌉), one or two planes.
        length: entries of a row.
        dtype: of the result, one that has −1.

    Returns:
        Shape (…, length).

    Raises:
        TypeError: for a dtype without −1.
        ValueError: if there are not one or two planes of ⌈length/8⌉ bytes.
    """
    check_votes(votes)
    signs = unpack_signs(votes[..., 0, :], length, dtype=dtype)
    if votes.shape[-2] == 1:
        return signs
    return signs * ~unpack_bits(votes[..., 1, :], length)


def pack_bits(bits: Tensor) -> Tensor:
    """Return booleans, shape (…, length), as bits, shape (…, ⌈length/8⌉).

    Args:
        bits: booleans.
    """
    missing = -bits.shape[-1] % 8
    if missing:
        bits = torch.cat([bits, bits.new_zeros(*bits.shape[:-1], missing)], dim=-1)
    eights = bits.view(torch.uint8).unflatten(-1, (bits.shape[-1] // 8, 8)).contiguous()
    eights = eights.view(torch.int64).squeeze(-1)
    return (eights * _GATHER >> 56 & 255).to(torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Return bits, shape (…, ⌈length/8⌉), as booleans, shape (…, length).

    Args:
        packed: uint8.
        length: entries of a row.
    """
    eights = packed.contiguous().to(torch.int64) * _COPIES & _DIAGONAL
    return eights.view(torch.uint8)[..., :length] != 0


def sum_dtype(ranks: int) -> torch.dtype:
    """Return the smallest integers that hold a sum of signs.

    Args:
        ranks: how many there are.
    """
    return torch.int8 if ranks <= 127 else torch.int16


def check_packable(x: Tensor) -> None:
    """Refuse what has no signs or no axis.

    Args:
        x: real numbers, shape (…, length).

    Raises:
        TypeError: for complex numbers.
        ValueError: if x has no axis.
    """
    if x.is_complex():
        raise TypeError(f"x is of {x.dtype}; complex numbers have no sign")
    if x.ndim == 0:
        raise ValueError("x has no axis to pack along; give x.view(1)")


def check_signed_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that does not hold signs.

    Args:
        dtype: of a result.

    Raises:
        TypeError: if it has no −1.
    """
    if not dtype.is_signed:
        raise TypeError(f"dtype={dtype} is not allowed; signs are −1 and +1: give a signed dtype")


def check_packed(packed: Tensor, length: int) -> None:
    """Refuse bytes that do not hold a row.

    Args:
        packed: shape (…, ⌈length/8⌉).
        length: entries of a row.

    Raises:
        ValueError: if they do not.
    """
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != (length + 7) // 8:
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}; signs of length={length} "
            f"are torch.uint8, {(length + 7) // 8} in the last axis"
        )


def check_ballots(packed: Tensor) -> int:
    """Return how many ranks have voted.

    Args:
        packed: shape (ranks, …, bytes).

    Raises:
        ValueError: if it has another shape or dtype, or no ranks or too many.
    """
    if packed.dtype != torch.uint8 or packed.ndim < 2 or not 0 < len(packed) < 2**15:
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}; stack the bytes, "
            "torch.uint8, of 1 to 32,767 ranks along a first axis"
        )
    return len(packed)


def check_votes(votes: Tensor) -> None:
    """Refuse what ``majority_vote`` does not return.

    Args:
        votes: shape (…, planes, bytes).

    Raises:
        ValueError: if there are not one or two planes.
    """
    if votes.ndim < 2 or votes.shape[-2] not in (1, 2):
        raise ValueError(f"votes have shape {tuple(votes.shape)}; it must be (…, 1 or 2, bytes)")
