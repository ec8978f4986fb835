"""Sizes of what is sent: parameters as FSDP2 pads them, rows as they are quantized.

Source: FSDP2's sharding of dimension 0, torch 2.11 on; Wang et al. 2023 (ZeRO++,
    arXiv:2306.10209, section 3.1), one scale for each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_ext.scaling._communication._traffic import require_whole
from lightning_ext.scaling._validate import require_count


def padded_parameters(shapes: Iterable[Sequence[int]], world: int) -> int:
    """Return the parameters of a unit as FSDP2 pads them: first dimensions to multiples of n.

        Σ n·⌈rows/n⌉·(entries of a row)

    Args:
        shapes: of the parameters of the unit, each with at least one dimension.
        world: n, ranks that a parameter is sharded over.

    Returns:
        A multiple of ``world``.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1, or a shape has no dimension.

    Example:
        >>> padded_parameters([(10, 3), (10,)], 4)
        48
    """
    require_count("world", world)
    total = 0
    for shape in shapes:
        if not shape:
            raise ValueError("a parameter without dimensions cannot be sharded; give it one row")
        for size in shape:
            require_count("a size of shapes", size)
        total += -(-shape[0] // world) * world * math.prod(shape[1:])
    return total


def block_bytes(length: int, *, bits: int, block_size: int, scale_bytes: int = 4) -> int:
    """Return the bytes of a row in codes, with a scale for each block of it.

        ⌈length·bits/8⌉ + ⌈length/block_size⌉·scale_bytes

    Args:
        length: entries of the row; the last block may be short.
        bits: of a code.
        block_size: entries of a block.
        scale_bytes: of a scale; a shift beside it counts.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if one is out of range.

    Example:
        >>> block_bytes(1000, bits=4, block_size=256)
        516
    """
    require_whole("length", length)
    require_count("bits", bits)
    require_count("block_size", block_size)
    require_whole("scale_bytes", scale_bytes)
    return -(-length * bits // 8) + -(-length // block_size) * scale_bytes
