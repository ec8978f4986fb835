"""Rounding up or down at random, so that the mean is what was rounded.

Source: Zamirai et al. 2020 ("Revisiting BFloat16 Training", arXiv:2010.06192).
Differs: the random bits come from a counter, so a run can be repeated; finite numbers stay finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain
from lightning_ext.functional._quantization._random_bits import check_counter, random_words, tile_of

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_LARGEST = 0x7F7F0000  # of bfloat16, as the bits of a float32
_QUIET = 0x00400000
_TILE = 1 << 16


def round_stochastic(
    x: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
) -> Tensor:
    """Return x rounded to one of its two neighbours in bfloat16, the mean of which is x.

        bits(out)_i = (bits(x)_i + low 16 bits of random_bits_i) >> 16

    Infinities and nan are kept. Beyond the largest bfloat16 a finite number is rounded to that one
    and has another mean. The result has no gradient.

    Args:
        x: float32 of any shape; other real dtypes are converted to it first.
        dtype: ``torch.bfloat16``.
        seed: 64 bits.
        step: 32 bits, the optimizer step for instance; a tensor as in ``random_bits``.
        stream: 32 bits, the rank for instance: ranks with one stream round alike.

    Returns:
        The shape of x, in ``dtype``.

    Raises:
        TypeError: if x is complex, or a DTensor.
        ValueError: if ``dtype`` is another one, or seed, step or stream do not fit.

    Example:
        >>> x = torch.full((1000,), 1.001)
        >>> rounded = round_stochastic(x, seed=0)
        >>> rounded.unique().tolist(), round(rounded.float().mean().item(), 3)
        ([1.0, 1.0078125], 1.001)
    """
    check_rounded(x, dtype)
    check_counter(seed, 0 if isinstance(step, Tensor) else step, stream)
    flat = x.detach().to(torch.float32).flatten()
    tile = tile_of(len(flat), _TILE, x.device)
    parts = []
    for start, part in zip(range(0, max(len(flat), 1), tile), flat.split(tile), strict=True):
        words = random_words(
            len(part), seed=seed, step=step, stream=stream, offset=start, device=x.device
        )
        parts.append(_rounded(part, words))
    return torch.cat(parts).view(dtype).view(x.shape)


def _rounded(x: Tensor, words: Tensor) -> Tensor:
    """Bits of bfloat16, int16."""
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    # A number less what it lies below is negative, and its sign makes a mask of all bits.
    below = (magnitude - _LARGEST).bitwise_right_shift_(31)
    noise = below.bitwise_and_(words).bitwise_and_(0xFFFF)
    # Without its low bits a nan could read as an infinity.
    quiet = (_INFINITY - magnitude).bitwise_right_shift_(31).bitwise_and_(_QUIET)
    return quiet.bitwise_or_(bits).add_(noise).bitwise_right_shift_(16).to(torch.int16)


def check_rounded(x: Tensor, dtype: torch.dtype) -> None:
    """Refuse what is not rounded, or not rounded to, at random.

    Args:
        x: real numbers.
        dtype: ``torch.bfloat16``.

    Raises:
        TypeError: if x is complex, or a DTensor.
        ValueError: if it is another one.
    """
    check_plain(x=x)
    if x.is_complex():
        raise TypeError(f"x is {x.dtype}; give real numbers, such as torch.view_as_real(x)")
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype={dtype} is not allowed; round_stochastic makes torch.bfloat16")
