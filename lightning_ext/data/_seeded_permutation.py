"""A permutation that depends on nothing but a seed and the number of the epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


class SeededPermutation(Sampler[int]):
    r"""Yields ``0 … n-1`` in the order drawn from ``seed + epoch``.

    The order is the one that :class:`torch.utils.data.DistributedSampler` draws for the same seed
    and epoch, before it pads and splits it.

    Args:
        num_samples: Length of the data set.
        seed: The same number on every rank.
        shuffle: ``False`` yields the indices in their own order.

    Example:
        >>> from lightning_ext.data import SeededPermutation
        >>> order = SeededPermutation(4, seed=0)
        >>> sorted(order)
        [0, 1, 2, 3]
    """

    def __init__(self, num_samples: int, seed: int = 0, *, shuffle: bool = True) -> None:
        if num_samples < 0:
            raise ValueError(f"num_samples was {num_samples}; it must be 0 or more.")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of that epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yields the indices of the present epoch."""
        if not self.shuffle:
            return iter(range(self.num_samples))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.num_samples, generator=generator).tolist())

    def __len__(self) -> int:
        """Number of indices in one epoch."""
        return self.num_samples


def seeded_order(sampler: Sampler[int] | Iterable[int], seed: int | None) -> Any:
    """The sampler itself, or a :class:`SeededPermutation` of the same samples in its place.

    Args:
        sampler: Any sampler with a length.
        seed: For a ``RandomSampler``, or instead of a ``DistributedSampler``'s own.

    Raises:
        TypeError: The sampler has no length.
        ValueError: A permutation of all samples is not what the sampler yields.
    """
    if not isinstance(sampler, Sized):
        raise TypeError(
            f"The sampler is a {type(sampler).__name__} without a length; every sample once per"
            " epoch needs one that has __len__."
        )
    if isinstance(sampler, DistributedSampler):
        return _of_distributed(sampler, seed)
    if seed is None or isinstance(sampler, SeededPermutation):
        return sampler
    if isinstance(sampler, RandomSampler) and _is_permutation(sampler):
        return SeededPermutation(len(sampler), seed)
    hint = "leave the seed out" if isinstance(sampler, SequentialSampler) else "seed it yourself"
    raise ValueError(
        f"seed was {seed} for a {type(sampler).__name__}; it is for a RandomSampler without"
        f" replacement and num_samples, or a DistributedSampler. Hint: {hint}."
    )


def _is_permutation(sampler: RandomSampler) -> bool:
    return not sampler.replacement and len(sampler) == len(sampler.data_source)


def _of_distributed(sampler: DistributedSampler[Any], seed: int | None) -> SeededPermutation:
    if type(sampler).__iter__ is not DistributedSampler.__iter__:
        raise ValueError(
            f"The sampler is a {type(sampler).__name__}, a DistributedSampler with an order of its"
            " own, which splits ranks before batches are known. Hint: pass a sampler of the whole"
            " order, the same on every rank, with num_replicas and rank."
        )
    dataset: Any = sampler.dataset
    chosen = sampler.seed if seed is None else seed
    return SeededPermutation(len(dataset), chosen, shuffle=sampler.shuffle)
