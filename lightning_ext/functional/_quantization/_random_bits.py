"""Random bits from a counter: the same for the same seed, step and stream, wherever they are made.

Source: Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), Philox4x32-10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TILE = 1 << 14  # counters


def random_bits(
    count: int,
    *,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return ``count`` words of 32 random bits, by Philox4x32-10.

        word(i) = lane i mod 4 of Philox(counter = (low, high of ⌊i/4⌋, step, stream), key = seed)

    Words of different seeds, steps or streams are independent of each other; a slice of a longer
    sequence is had by its ``offset``.

    Args:
        count: words.
        seed: 64 bits, the key.
        step: 32 bits, the optimizer step for instance: a number, or a tensor of no dimension,
            whose fraction does not count and which is neither checked nor waited for.
        stream: 32 bits, the rank for instance.
        offset: the first i; below 2⁶⁶.
        device: where the words are made; torch's default where None.

    Returns:
        Shape ``(count,)``, int64, each in [0, 2³²).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [hex(word) for word in random_bits(2, seed=0).tolist()]
        ['0x6627e8d5', '0xe169c58d']
    """
    words = random_words(count, seed=seed, step=step, stream=stream, offset=offset, device=device)
    return words.to(torch.int64).bitwise_and_(_WORD)


def random_words(
    count: int,
    *,
    seed: int,
    step: int | Tensor = 0,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return what ``random_bits`` returns, as int32 reads it."""
    if count < 0 or not 0 <= offset <= (1 << 66) - count:
        raise ValueError(
            f"count={count} and offset={offset} are not allowed; words lie in [0, 2**66)"
        )
    check_counter(seed, 0 if isinstance(step, Tensor) else step, stream)
    first, last = offset // 4, -(-(offset + count) // 4)
    place = torch.empty(0, device=device).device
    tile = tile_of(last - first, _TILE, place)
    words = [
        philox(_counters(start, min(start + tile, last), place), seed, step, stream)
        for start in range(first, max(last, first + 1), tile)
    ]
    whole = words[0] if len(words) == 1 else torch.cat(words)
    return whole[offset - 4 * first :][:count]


def tile_of(count: int, most: int, device: torch.device) -> int:
    """Return how many entries to take at once.

    Args:
        count: entries in all.
        most: as many as leave temporaries in a core's cache. A compiler makes none, and would
            unroll the loop.
        device: where they are; one that is no CPU takes them all at once.
    """
    whole = torch.compiler.is_compiling() or device.type != "cpu"
    return max(count, 1) if whole else most


def check_counter(seed: int, step: int, stream: int) -> None:
    """Refuse what does not fit into the key and the counter.

    Args:
        seed: in [0, 2⁶⁴).
        step: in [0, 2³²).
        stream: in [0, 2³²).

    Raises:
        ValueError: if one does not fit.
    """
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("stream", stream, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}={value} is not allowed; it must lie in [0, 2**{bits})")


def philox(counters: Tensor, seed: int, step: int | Tensor, stream: int) -> Tensor:
    """Return the four words of each counter, one after the other.

    Args:
        counters: shape (n,), int64, all of whose bits count.
        seed: the key.
        step: the third word of every counter.
        stream: the fourth.

    Returns:
        Shape (4 n,), int32.
    """
    key = (seed & _WORD, seed >> 32)
    if isinstance(step, Tensor):
        step = step.to(counters.device, non_blocking=True).to(torch.int64) & _WORD
    third = torch.zeros_like(counters).add_(step)
    state: tuple[Any, ...] = (counters & _WORD, (counters >> 32) & _WORD, third, stream)
    for _ in range(_ROUNDS):
        state = _round(state, key)
        key = ((key[0] + _KEY_STEPS[0]) & _WORD, (key[1] + _KEY_STEPS[1]) & _WORD)
    return torch.stack([word.to(torch.int32) for word in state], dim=1).flatten()


def _counters(start: int, end: int, device: torch.device) -> Tensor:
    """All 64 bits of the counters from ``start`` to ``end``, whatever int64 reads them as."""
    signed = start - (1 << 64) if start >> 63 else start
    return torch.arange(end - start, device=device) + signed


def _round(state: tuple[Any, ...], key: tuple[int, int]) -> tuple[Any, ...]:
    """A round; of the words only those that are multiplied next are free of what is above them."""
    low, high = state[0] * _MULTIPLIERS[0], state[2] * _MULTIPLIERS[1]
    return _mixed(high, state[1], key[0]), high, _mixed(low, state[3], key[1]), low


def _mixed(product: Tensor, word: Tensor | int, key: int) -> Tensor:
    # A product may wrap around 2⁶³; its bits are right, and the mask takes the sign's copies away.
    return (product >> 32).bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_WORD)
