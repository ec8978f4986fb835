"""Squared norms of lists of tensors, of their differences, and of sums and what was added to them.

A program sums up a chunk in float32; a second, small launch adds up the chunks of each group,
always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._kept import kept, on_device

SQUARES, CHANGE, ALL = 1, 2, 3  # what is summed up: x²; (x − y)²; (x − y)², x² and (x − y) y

_BLOCK = {SQUARES: 8192, CHANGE: 4096, ALL: 4096}  # of two columns more would fill the registers
_PARTIALS = 1024  # that the second launch takes at a time


@triton.jit
def _chunk(
    table,
    count,
    partials,
    programs,
    tensor,
    offsets,
    size,
    WHAT: tl.constexpr,
    WRITE: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    COLUMNS: tl.constexpr = 1 if WHAT == 1 else 2
    code = multi.dtype_code(table, count, COLUMNS, 0, tensor, X)
    where = multi.address(table, count, 0, tensor)
    x = multi.load(where, code, offsets, size, X, ALIGNED, MASKED)
    mine = partials + tl.program_id(0)
    if WHAT == 1:
        tl.store(mine, tl.sum(x * x))
    else:
        code = multi.dtype_code(table, count, COLUMNS, 1, tensor, Y)
        where = multi.address(table, count, 1, tensor)
        y = multi.load(where, code, offsets, size, Y, ALIGNED, MASKED)
        change = x - y
        tl.store(mine, tl.sum(change * change))
        if WHAT == 3:
            tl.store(mine + programs, tl.sum(x * x))
            tl.store(mine + 2 * programs, tl.sum(change * y))
        if WRITE:
            multi.store(where, code, offsets, size, x, Y, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["count"])
def sq_norms_kernel(
    table,
    chunks,
    count,
    partials,
    programs,
    WHAT: tl.constexpr,
    WRITE: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = multi.locate(table, chunks, count, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _chunk(
            table,
            count,
            partials,
            programs,
            tensor,
            offsets,
            size,
            WHAT,
            WRITE,
            X,
            Y,
            ALIGNED,
            False,
        )
    else:
        _chunk(
            table,
            count,
            partials,
            programs,
            tensor,
            offsets,
            size,
            WHAT,
            WRITE,
            X,
            Y,
            ALIGNED,
            True,
        )


@triton.jit
def group_sums_kernel(partials, bounds, sums, programs, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = tl.load(bounds + group)
    stop = tl.load(bounds + group + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(partials + row * programs + offsets, mask=offsets < stop, other=0.0)
    tl.store(sums + row * groups + group, tl.sum(total))


def sq_norms(
    columns: multi.Columns, members: Sequence[int], groups: int, what: int, *, write: bool = False
) -> Tensor:
    """Launch the kernels; the caller has checked what it gives.

    Args:
        columns: x, and y where it is asked for, at least one tensor in each.
        members: the group of each tensor.
        groups: how many there are.
        what: SQUARES, CHANGE or ALL.
        write: whether to copy x to y.

    Returns:
        Shape (1, or 3 for ALL, groups).
    """
    order = sorted(range(len(members)), key=members.__getitem__)
    if order != list(range(len(members))):
        columns = [[column[i] for i in order] for column in columns]
    device = columns[0][0].device
    with multi.flat(columns, written=(1,) if write else ()) as flat:
        given = multi.tables(flat, _BLOCK[what])
        rows = 3 if what == ALL else 1
        if not given.programs:
            return torch.zeros(rows, groups, device=device)
        partials = torch.empty(rows, given.programs, dtype=torch.float32, device=device)
        sq_norms_kernel[(given.programs,)](
            given.table,
            given.chunks,
            given.count,
            partials,
            given.programs,
            WHAT=what,
            WRITE=write,
            X=given.dtypes[0],
            Y=given.dtypes[-1],
            ALIGNED=given.aligned,
            BLOCK=_BLOCK[what],
            num_warps=8,
        )
    counts = [0] * groups
    for x, group in zip(flat[0], [members[i] for i in order], strict=True):
        counts[group] += triton.cdiv(x.numel(), _BLOCK[what])
    sums = torch.empty(rows, groups, dtype=torch.float32, device=device)
    bounds = _bounds(device, tuple(accumulate(counts, initial=0)))
    group_sums_kernel[(groups, rows)](
        partials, bounds, sums, given.programs, groups, BLOCK=_PARTIALS, num_warps=4
    )
    return sums


@kept
def _bounds(device: torch.device, bounds: tuple[int, ...]) -> Tensor:
    return on_device(bounds, torch.int32, device)
