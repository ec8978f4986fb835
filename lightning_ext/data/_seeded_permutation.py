"""A permutation that depends on nothing but a seed and the number of the epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
