"""Cuts a batch into smaller ones along its samples, and joins what they returned."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a batch may hold beside arrays; every chunk gets it whole.
_PLAIN = (str, bytes, bool, int, float, complex, type(None), np.generic, torch.dtype, torch.device)


def count_samples(batch: Any) -> int:
    """Samples of a batch: the length in dimension 0 of every array in it.

    Args:
        batch: Tensors and NumPy arrays, in lists, tuples, mappings and dataclasses.

    Raises:
        ValueError: There is no such length, or something in it cannot be cut.
    """
    lengths = sorted(set(_lengths(batch)))
    if len(lengths) != 1:
        found = f"lengths {lengths}" if lengths else "no tensor with a dimension"
        raise ValueError(
            f"the batch has {found} in dimension 0, not one number of samples. Hint: tensors with"
            " the samples in dimension 0, or a smaller micro-batch."
        )
    _take(batch, lengths[0], slice(0))
    return lengths[0]


def cut(batch: Any, sizes: Sequence[int]) -> Iterator[Any]:
    """Consecutive chunks of a batch, as views of its arrays.

    Arrays are cut in dimension 0, and so are lists and tuples that hold no arrays and are as long;
    0-d arrays, numbers and strings go into every chunk.

    Args:
        batch: What :func:`count_samples` can count.
        sizes: Samples of each chunk; together those of the batch.
    """
    samples, begin = sum(sizes), 0
    for size in sizes:
        yield _take(batch, samples, slice(begin, begin + size))
        begin += size


def even_sizes(samples: int, limit: int) -> list[int]:
    """The fewest chunks of at most ``limit`` samples, as equal as they can be, large ones first."""
    count = -(-samples // limit)
    whole, rest = divmod(samples, count)
    return [whole + (index < rest) for index in range(count)]


def join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What the chunks of one batch returned, as if it were the batch's.

    Tensors, lists and tuples as long as their chunk are concatenated, 0-d floating tensors
    averaged over samples, mappings and structures of equal form joined entry by entry; of anything
    else the last chunk's counts. Tensors come back detached.
    """
    last = outputs[-1]
    if all(isinstance(output, Tensor) for output in outputs):
        return _join_tensors([output.detach() for output in outputs], sizes)
    if all(isinstance(o, MutableMapping) and o.keys() == last.keys() for o in outputs):
        return {key: join([output[key] for output in outputs], sizes) for key in last}
    if all(isinstance(output, list | tuple) for output in outputs):
        return _join_sequences(outputs, sizes)
    return last


def _lengths(part: Any) -> Iterator[int]:
    if isinstance(part, Tensor | np.ndarray):
        yield from part.shape[:1]
    else:
        for child in _children(part):
            yield from _lengths(child)


def _children(part: Any) -> Sequence[Any]:
    if isinstance(part, MutableMapping):
        return list(part.values())
    if isinstance(part, list | tuple):
        return part
    if is_dataclass(part) and not isinstance(part, type):
        return [getattr(part, field.name) for field in fields(part)]
    return ()


def _take(part: Any, samples: int, which: slice) -> Any:
    if isinstance(part, Tensor | np.ndarray):
        return part[which] if part.ndim else part
    if isinstance(part, list | tuple):
        return _take_sequence(part, samples, which)
    if isinstance(part, MutableMapping):
        mapping = copy.copy(part)
        mapping.update({key: _take(value, samples, which) for key, value in part.items()})
        return mapping
    if is_dataclass(part) and not isinstance(part, type):
        record = copy.copy(part)
        for field in fields(part):
            value = _take(getattr(part, field.name), samples, which)
            object.__setattr__(record, field.name, value)  # it may be frozen
        return record
    if isinstance(part, _PLAIN):
        return part
    raise ValueError(
        f"the batch holds a {type(part).__name__}, which cannot be cut. Hint: tensors in lists,"
        " tuples, mappings or dataclasses, or a smaller micro-batch."
    )


def _take_sequence(part: Any, samples: int, which: slice) -> Any:
    named = hasattr(part, "_fields")
    if len(part) == samples and not named and not any(True for _ in _lengths(part)):
        return part[which]
    values = [_take(value, samples, which) for value in part]
    return type(part)(*values) if named else type(part)(values)


def _join_tensors(outputs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    last = outputs[-1]
    if all(output.shape[:1] == (size,) for output, size in zip(outputs, sizes, strict=True)):
        return torch.cat(list(outputs))
    if last.ndim or not last.is_floating_point():
        return last
    samples = sum(sizes)
    mean = torch.zeros_like(last)
    for output, size in zip(outputs, sizes, strict=True):
        mean += output * (size / samples)
    return mean


def _join_sequences(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    last = outputs[-1]
    named = hasattr(last, "_fields")
    per_sample = all(len(o) == size for o, size in zip(outputs, sizes, strict=True))
    if per_sample and not named and not any(True for output in outputs for _ in _lengths(output)):
        return type(last)(value for output in outputs for value in output)
    if any(len(output) != len(last) for output in outputs):
        return last
    values = [join(same, sizes) for same in zip(*outputs, strict=True)]
    return type(last)(*values) if named else type(last)(values)
