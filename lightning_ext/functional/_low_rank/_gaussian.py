"""A random projection that is made again from its seed instead of being kept.

Source: Zhu et al. 2025 (APOLLO, arXiv:2412.05270), section 4; Box and Muller 1958 for the normals.
Differs: its bits come from a counter, so that all devices and ranks make the same one but for how
    they round logarithms and sines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ext.functional._quantization._random_bits import random_bits


def gaussian_projection(
    rank: int,
    width: int,
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return a matrix of normal entries with mean 0 and variance 1/rank.

    Entries 2k and 2k + 1, by rows, are √(−2 ln u)·cos 2πv and √(−2 ln u)·sin 2πv over √rank, with
    u and v words 2k and 2k + 1 of ``random_bits``, rounded to the dtype, plus ½ and over 2³². What
    is rounded before the functions is the same on all devices. Dtypes below float32 are made in it.

    Args:
        rank: rows, at least 1.
        width: columns.
        seed: of the bits, 64 bits.
        step: 32 bits.
        stream: 32 bits, another one for each matrix.
        device: where it is made; torch's default where None.
        dtype: of the result.

    Returns:
        Shape (rank, width).

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> gaussian_projection(1, 2, seed=0)
        tensor([[ 0.9911, -0.9247]])
    """
    if rank < 1 or width < 0:
        raise ValueError(f"rank={rank} and width={width} are not allowed; they count at least 1, 0")
    count = rank * width
    words = random_bits(count + count % 2, seed=seed, step=step, stream=stream, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    lengths, angles = (words[i::2].to(wide).add_(0.5) for i in (0, 1))
    lengths.mul_(2.0**-32).log_().mul_(-2.0 / rank).sqrt_()
    angles.mul_(2 * math.pi / 2.0**32)
    pairs = torch.stack([angles.cos().mul_(lengths), angles.sin_().mul_(lengths)], dim=1)
    return pairs.view(-1)[:count].view(rank, width).to(dtype)
