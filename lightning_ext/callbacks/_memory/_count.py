"""Bytes of storages, each counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_ext._lightning import local_part


def storage_bytes(tensors: Iterable[Tensor], *, without: Iterable[Tensor] = ()) -> int:
    """Adds up the storages of tensors, whole ones, each once.

    Args:
        tensors: Of those that ranks split, this rank's part counts.
        without: Tensors whose storages do not count.
    """
    left_out = {_storage(x)._cdata for x in without}
    found = {storage._cdata: storage.nbytes() for storage in map(_storage, tensors)}
    return sum(size for key, size in found.items() if key not in left_out)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Walks mappings, lists, tuples and sets to the tensors in them.

    Args:
        value: Such as the state of an optimizer.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from tensors_in(each)


def _storage(tensor: Tensor) -> Any:
    own = local_part(tensor) if isinstance(tensor, DTensor) else tensor
    return own.untyped_storage()
