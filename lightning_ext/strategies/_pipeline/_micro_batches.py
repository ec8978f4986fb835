"""Cuts a batch into micro-batches, and tells whether ranks have the same one."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_PRIME = 65_521
_HOOK = "a method pipeline_micro_batches(batch, count) of the module, which decides alone"

Path = tuple[Any, ...]


class Cutter:
    """Cuts the batches of a fit into micro-batches of the size that the first has.

    Args:
        own: ``pipeline_micro_batches`` of the module, if it has one.
    """

    def __init__(self, own: Callable[[Any, int], Any] | None) -> None:
        self._own, self._size = own, None if own is None else 1
        self._known: dict[Path, bool] = {}

    @property
    def size(self) -> int:
        """Samples of a micro-batch of the last batch; 1 if that cannot be told."""
        return self._size or 1

    def parts(self, batch: Any, count: int) -> list[Any]:
        """Micro-batches of a batch.

        Args:
            batch: Tensors in tuples, lists and dicts; with an own method, anything.
            count: Micro-batches of the first batch; with an own method, of this one.

        Raises:
            MisconfigurationException: It cannot be cut, or in several ways.
        """
        if self._own is not None:
            return self._own_parts(self._own(batch, count), count)
        samples = samples_of(batch)
        size = self._size or samples // count
        if size == 0 or samples % size or (self._size is None and samples % count):
            parts = f"{count} equal micro-batches"
            if self._size is not None:
                parts = f"micro-batches of {size}, as the first was"
            raise MisconfigurationException(
                f"A batch of {samples} samples cannot be cut into {parts}; allowed are multiples of"
                f" {self._size or count}. Hint: another"
                " batch_size or num_microbatches, and DataLoader(drop_last=True) for the last"
                " batch of an epoch."
            )
        self._size = size
        return cut(batch, samples, samples // size, known=self._known)

    def _own_parts(self, parts: Any, count: int) -> list[Any]:
        if not isinstance(parts, (list, tuple)) or len(parts) != count:
            number = f" of {len(parts)}" if isinstance(parts, (list, tuple)) else ""
            raise MisconfigurationException(
                f"pipeline_micro_batches returned a {type(parts).__name__}{number}; allowed is a"
                f" list of {count} micro-batches, as many as it was asked for. Hint: return"
                " [part(batch, i) for i in range(count)]."
            )
        sizes = _first_dimensions(parts[0])
        self._size = max(sizes[0], 1) if sizes else 1
        return list(parts)


def samples_of(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor that is in no inner list.

    Where all tensors are in lists and tuples below the batch's own, it is that of the first.

    Args:
        batch: Tensors in tuples, lists and dicts.

    Raises:
        MisconfigurationException: There is none, or more tensors have another first dimension.
    """
    sizes = _fields(batch) or _first_dimensions(batch)
    if not sizes:
        raise MisconfigurationException(
            f"No tensor was found in a batch, a {type(batch).__name__}, that could be cut into"
            " micro-batches. Allowed are tensors in tuples, lists and dicts. Hint: a collate_fn"
            f" that returns a dict, or {_HOOK}."
        )
    samples = sizes[0]
    rows = Counter(len(x) for _, x in _values(batch, samples) if _has_rows(x))
    size, times = rows.most_common(1)[0] if rows else (samples, 0)
    if times > rows[samples]:
        raise MisconfigurationException(
            f"The first tensor of a batch has {samples} rows, but {times} others have {size}, so"
            " that it is uncertain how many samples there are. Allowed is a first tensor with a"
            " sample in each row, as most others. Hint: a collate_fn that puts it first, or"
            f" {_HOOK}."
        )
    return samples


def cut(
    batch: Any,
    samples: int,
    count: int,
    *,
    known: dict[Path, bool] | None = None,
    whole: Collection[int] = (),
) -> list[Any]:
    """Equal parts of a batch.

    Tensors and arrays with a sample in each row are cut, and lists and tuples with an element for
    each sample, other than the batch itself and named tuples; all else is in every part as it is.

    Args:
        batch: Tensors in tuples, lists and dicts.
        samples: Of the batch; a multiple of ``count``.
        count: Parts.
        known: What was cut of earlier batches, by its place; gets what is cut of this one.
        whole: Identities of tensors that are not cut.

    Raises:
        MisconfigurationException: A list may be read in two ways, or what is cut was not cut of an
            earlier batch, or the reverse.
    """
    if count == 1:
        return [batch]
    known = {} if known is None else known
    columns = {
        id(value)
        for path, value in _values(batch, samples, known)
        if _is_column(path, value, samples, known) and id(value) not in whole
    }
    leaves, spec = tree_flatten(batch, is_leaf=lambda value: id(value) in columns)
    size = samples // count
    return [
        tree_unflatten([x[i : i + size] if id(x) in columns else x for x in leaves], spec)
        for i in range(0, samples, size)
    ]


def _values(
    value: Any, samples: int, known: dict[Path, bool] | None = None, path: Path = ()
) -> Iterator[tuple[Path, Any]]:
    """Tensors, and lists below the root, by place; nothing of what is in a list of samples."""
    is_list = type(value) in (list, tuple) and path != ()
    if is_list or _has_rows(value):
        yield path, value
    if is_list and len(value) == samples and not _is_structure(path, value, samples, known):
        return
    for key, child in _children(value):
        yield from _values(child, samples, known, (*path, key))


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    children, spec = tree_flatten(value, is_leaf=lambda one: one is not value)
    if not spec.is_leaf():
        keys = value if isinstance(value, dict) else range(len(children))
        yield from zip(keys, children, strict=True)


def _is_column(path: Path, value: Any, samples: int, known: dict[Path, bool]) -> bool:
    found = len(value) == samples
    if found and not _has_rows(value):
        found = not _is_structure(path, value, samples, known)
    if known.setdefault(path, found) != found:
        raise MisconfigurationException(
            f"{_name(path)} has {len(value)} rows or elements in a batch of {samples} samples,"
            f" and in an earlier batch it had {'one' if known[path] else 'other than one'} for each"
            " sample. Allowed is one for each sample in all batches or in none. Hint: another"
            f" batch_size, or {_HOOK}."
        )
    return found


def _is_structure(path: Path, value: Any, samples: int, known: dict[Path, bool] | None) -> bool:
    """Whether a list of as many elements as samples has samples within them instead."""
    lengths = [n for one in value for n in _lengths(one, samples)]
    if not lengths or any(n != samples for n in lengths):
        return False
    if known is None:  # who only counts takes the tensors in it as well
        return True
    if path in known:
        return not known[path]
    raise MisconfigurationException(
        f"{_name(path)} is a {type(value).__name__} of {samples} elements with {samples} rows each,"
        f" in a batch of {samples} samples: it may have an element or a row for each sample."
        f" Allowed is one of both. Hint: another batch_size, or {_HOOK}."
    )


def _lengths(value: Any, samples: int) -> Iterator[int]:
    """Of tensors and lists of samples in a value."""
    if _has_rows(value) or (type(value) in (list, tuple) and len(value) == samples):
        yield len(value)
    else:
        for _, child in _children(value):
            yield from _lengths(child, samples)


def _has_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _first_dimensions(batch: Any) -> list[int]:
    leaves = tree_leaves(batch)
    return [len(value) for value in leaves if isinstance(value, Tensor) and value.ndim]


def _fields(value: Any, *, is_root: bool = True) -> list[int]:
    """First dimensions of tensors that are in no list below the root."""
    if isinstance(value, Tensor):
        return _first_dimensions(value)
    if type(value) in (list, tuple) and not is_root:
        return []
    return [n for _, child in _children(value) for n in _fields(child, is_root=False)]


def _name(path: Path) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)


def checksum(batch: Any) -> int:
    """A number of 63 bits that two batches share if they are the same, and hardly else.

    Args:
        batch: Tensors, texts and numbers in tuples, lists and dicts; of other things, their type.
    """
    total = 0
    for value in tree_leaves(batch):
        own = _of_tensor(value) if isinstance(value, Tensor) else 0
        total = (total * 1_000_003 + own + zlib.crc32(_kind(value))) % 2**63
    return total


def _kind(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}".encode()
    plain = value is None or isinstance(value, (str, bytes, int, float))
    return repr(value if plain else type(value)).encode()


def _of_tensor(value: Tensor) -> int:
    if value.is_nested or value.layout != torch.strided:
        return 0
    value = value.detach().resolve_conj().resolve_neg()
    octets = value.contiguous().view(-1).view(torch.uint8)
    if value.device.type == "cpu":
        return zlib.crc32(octets.numpy().tobytes())
    places = torch.arange(octets.numel(), device=value.device) % _PRIME + 1
    return int((octets.long() * places).sum()) % 2**32
