"""Stretches of lists that a CPU's cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

CACHED = 2**17  # entries of which a CPU keeps what an update reads and writes in its cache


def cached_lists(columns: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Yield stretches of contiguous tensors' lists that a CPU's cache holds; long tensors in parts.

    Args:
        columns: lists of equally many tensors; one of a single entry goes with all parts of others.
    """
    lists = [list(column) for column in columns]
    start, total = 0, 0
    for i, x in enumerate(lists[0]):
        size = x.numel()
        if total + size > CACHED and i > start:
            yield [column[start:i] for column in lists]
            start, total = i, 0
        total += size
        if size > CACHED:
            for k in range(0, size, CACHED):
                yield [[part_of(column[i], k)] for column in lists]
            start, total = i + 1, 0
    if start < len(lists[0]):
        yield [column[start:] for column in lists]


def part_of(x: Tensor, start: int) -> Tensor:
    """Return CACHED entries of a contiguous tensor; all of one that has a single entry.

    Args:
        x: the tensor.
        start: the first of them.
    """
    return x if x.numel() == 1 else x.view(-1)[start : start + CACHED]
