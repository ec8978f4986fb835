"""One launch over lists of tensors: tables of addresses and of chunks, and their device side.

A launch works on `columns`, lists of equally many tensors of which the i-th ones have equally many
entries (parameters, gradients, first moments…). Each program takes a chunk of BLOCK consecutive
entries of one tensor. What a program needs stands in two tables on the device:

    table, int64, rows of `count` entries: sizes | first chunks | addresses of every column |
        dtype codes of every column
    chunks, int32, (programs, 2): tensor, chunk within it

Source: the pointer and chunk lists of apex's multi_tensor_apply, which torch's foreach kernels
    took over.
Differs: the tables lie in device memory, so their length has no bound and one launch does; dtypes
    may differ within a column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._kept import kept, moved, on_device

Columns = Sequence[Sequence[Tensor]]

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_dtype_of = attrgetter("dtype")


@dataclass(frozen=True)
class Tables:
    """What a launch over columns is given.

    Attributes:
        table: sizes, first chunks, addresses, dtype codes; shape (2 + 2 columns, count), int64.
        chunks: tensor and chunk of each program; shape (programs, 2), int32.
        count: tensors in each column.
        columns: how many there are.
        programs: chunks of all tensors.
        dtypes: of each column, as a constexpr; ``None`` where they differ or are no floats.
        aligned: whether all addresses are multiples of 16 bytes, but for columns of
            single entries, such as counts of steps.
    """

    table: Tensor
    chunks: Tensor
    count: int
    columns: int
    programs: int
    dtypes: tuple[Any, ...]
    aligned: bool


def tables(columns: Columns, block: int) -> Tables:
    """Return the tables of a launch, those of an earlier one where no storage has changed.

    Args:
        columns: lists of equally many tensors. The first one's sizes count: others, such as codes
            and scales, may have others if the kernel knows what to do with them. Entries are taken
            in the order of memory: see ``flat``.
        block: entries of a chunk.
    """
    device = columns[0][0].device
    sizes = tuple(map(Tensor.numel, columns[0]))
    tensors = list(chain.from_iterable(columns))
    addresses = tuple(map(Tensor.data_ptr, tensors))
    types = tuple(map(_dtype_of, tensors))
    single = tuple([column[0].numel() == 1 and _all_single(column) for column in columns])
    return _build(device, block, len(columns), sizes, addresses, types, single)


@contextmanager
def flat(columns: Columns, *, written: Sequence[int], row_major: bool = False) -> Iterator[Columns]:
    """Give columns whose tensors can be taken in the order of memory, and write results back.

    Tensors of equal strides without holes stay as they are, others are copied.

    Args:
        columns: lists of equally many tensors, of which the i-th ones have one shape.
        written: indices of the columns that the launch changes.
        row_major: whether the order of memory must be that of the indices, too.
    """
    ready, copied = columns, set[int]()
    if not all(all(map(Tensor.is_contiguous, column)) for column in columns):
        ready, copied = _dense(columns, row_major)
    yield ready
    for which in written:
        changed = columns[which]
        for i in copied:
            if ready[which][i] is not changed[i]:
                changed[i].copy_(ready[which][i])
        if not any(map(Tensor.is_inference, changed)):
            torch.autograd.graph.increment_version(changed)


def _dense(columns: Columns, row_major: bool) -> tuple[Columns, set[int]]:
    """Columns that can be taken in the order of memory, and where some of them are copies."""
    ready = [list(column) for column in columns]
    copied = set()
    for i, row in enumerate(zip(*columns, strict=True)):
        if all(map(Tensor.is_contiguous, row)) or (not row_major and _dense_alike(row)):
            continue
        for dense, x in zip(ready, row, strict=True):
            dense[i] = x.contiguous()
        copied.add(i)
    return ready, copied


def _all_single(tensors: Sequence[Tensor]) -> bool:
    return all(x.numel() == 1 for x in tensors)


@kept
def _build(
    device: torch.device,
    block: int,
    columns: int,
    sizes: tuple[int, ...],
    addresses: tuple[int, ...],
    types: tuple[torch.dtype, ...],
    single: tuple[bool, ...],
) -> Tables:
    count = len(sizes)
    chunks, firsts = _chunk_table(device, block, sizes)
    codes = [_CODES.get(dtype, -1) for dtype in types]
    table = on_device([*sizes, *firsts, *addresses, *codes], torch.int64, device)
    by_column = [set(types[i * count : (i + 1) * count]) for i in range(columns)]
    dtypes = tuple(_TYPES.get(next(iter(t))) if len(t) == 1 else None for t in by_column)
    aligned = all(
        column_is_single or all(address % 16 == 0 for address in addresses[i * count :][:count])
        for i, column_is_single in enumerate(single)
    )
    return Tables(
        table.view(2 + 2 * columns, count), chunks, count, columns, len(chunks), dtypes, aligned
    )


@kept
def _chunk_table(
    device: torch.device, block: int, sizes: tuple[int, ...]
) -> tuple[Tensor, list[int]]:
    """Tensor and chunk of each program, and the first program of each tensor."""
    counts = torch.tensor([-(-size // block) for size in sizes], device="cpu")
    tensors = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    firsts = counts.cumsum(0) - counts
    places = torch.arange(len(tensors), device="cpu") - firsts[tensors]
    chunks = torch.stack([tensors, places], dim=1).int()
    return moved(chunks, device), firsts.tolist()


def _dense_alike(row: Sequence[Tensor]) -> bool:
    strides = row[0].stride()
    if any(x.stride() != strides for x in row):
        return False
    return all([torch.ops.aten.is_non_overlapping_and_dense(x) for x in row])


@triton.jit
def locate(table, chunks, count, BLOCK: tl.constexpr):
    """The tensor of this program, its first entry (int64) and the tensor's size (int64)."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    return tensor, start, tl.load(table + tensor)


@triton.jit
def first_chunk(table, count, tensor):
    """The first program of a tensor: where its partial results begin."""
    return tl.load(table + count + tensor)


@triton.jit
def address(table, count, column, tensor):
    """The address of a tensor of a column, int64."""
    return tl.load(table + (2 + column) * count + tensor)


@triton.jit
def dtype_code(table, count, COLUMNS: tl.constexpr, column, tensor, DTYPE: tl.constexpr):
    """The code of a tensor's dtype; 0 where the whole column has one, which needs none."""
    if DTYPE is None:
        return tl.load(table + (2 + COLUMNS + column) * count + tensor).to(tl.int32)
    return 0


@triton.jit
def _pointer(where, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = where.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(where, offsets, size, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    pointer = _pointer(where, DTYPE, ALIGNED)
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < size, other=0).to(tl.float32)
    else:
        return tl.load(pointer + offsets).to(tl.float32)


@triton.jit
def load(
    where,
    code,
    offsets,
    size,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Entries of a tensor in float32, 0 behind its end.

    where, code: its address and dtype code. offsets: int64, from a multiple of BLOCK on. size: its
    entries. DTYPE: of the column, None for several. MASKED: whether offsets may reach its end.
    """
    if DTYPE is None:
        x = tl.zeros(offsets.shape, tl.float32)
        if code == 0:
            x = _load(where, offsets, size, tl.float32, ALIGNED, MASKED)
        elif code == 1:
            x = _load(where, offsets, size, tl.bfloat16, ALIGNED, MASKED)
        else:
            x = _load(where, offsets, size, tl.float16, ALIGNED, MASKED)
        return x
    else:
        return _load(where, offsets, size, DTYPE, ALIGNED, MASKED)


@triton.jit
def _store(
    where, offsets, size, x, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):
    pointer = _pointer(where, DTYPE, ALIGNED)
    if MASKED:
        tl.store(pointer + offsets, x.to(DTYPE), mask=offsets < size)
    else:
        tl.store(pointer + offsets, x.to(DTYPE))


@triton.jit
def store(
    where,
    code,
    offsets,
    size,
    x,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write entries of a tensor; the arguments of ``load``, and x in float32."""
    if DTYPE is None:
        if code == 0:
            _store(where, offsets, size, x, tl.float32, ALIGNED, MASKED)
        elif code == 1:
            _store(where, offsets, size, x, tl.bfloat16, ALIGNED, MASKED)
        else:
            _store(where, offsets, size, x, tl.float16, ALIGNED, MASKED)
    else:
        _store(where, offsets, size, x, DTYPE, ALIGNED, MASKED)
