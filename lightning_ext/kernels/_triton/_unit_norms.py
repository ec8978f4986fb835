"""Norms of the rows of a list of matrices; a matrix of one row is spread over a program's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._kept import kept, on_device

_ROWS, _COLUMNS = 16, 128


@triton.jit(do_not_specialize=["count"])
def unit_norms_kernel(
    table,
    chunks,
    count,
    widths,
    norms,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tensor, start, size = multi.locate(table, chunks, count, ROWS)
    width = tl.load(widths + tensor)
    where = multi.address(table, count, 0, tensor)
    code = multi.dtype_code(table, count, 1, 0, tensor, DTYPE)
    rows = tl.arange(0, ROWS)
    inside = start + rows < size
    single = size == 1
    piece = tl.where(single, tl.cdiv(width, ROWS), width)
    first = tl.where(single, rows * piece, (start + rows) * width)
    stop = tl.where(single, tl.minimum(first + piece, width), tl.where(inside, first + width, 0))
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, piece, COLUMNS):
        offsets = (first + begin)[:, None] + tl.arange(0, COLUMNS)[None, :]
        x = multi.load(where, code, offsets, stop[:, None], DTYPE, ALIGNED, True)
        total += x * x
    sums = tl.sum(total, axis=1)
    sums = tl.where(single, tl.sum(sums, axis=0), sums)
    out = norms + tl.program_id(0).to(tl.int64) * ROWS + rows
    tl.store(out, tl.sqrt_rn(sums), mask=inside)


def unit_norms(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Launch the kernel; the caller has checked what it gives.

    Args:
        tensors: the first dimension of a tensor of several counts units.
        shapes: of the norms of each.
    """
    device = tensors[0].device
    full = [i for i, x in enumerate(tensors) if x.numel()]
    norms = [
        x if x.numel() else torch.zeros(shape, dtype=torch.float32, device=device)
        for x, shape in zip(tensors, shapes, strict=True)
    ]
    if not full:
        return norms
    kept = [tensors[i].contiguous() for i in full]
    units = [math.prod(shapes[i]) for i in full]
    # One entry a row, so that a chunk is some rows; it begins where the tensor does.
    heads = [x.view(count, -1)[:, 0] for x, count in zip(kept, units, strict=True)]
    widths = tuple(x.numel() // count for x, count in zip(kept, units, strict=True))
    given = multi.tables([heads], _ROWS)
    found = torch.empty(given.programs * _ROWS, dtype=torch.float32, device=device)
    unit_norms_kernel[(given.programs,)](
        given.table,
        given.chunks,
        given.count,
        _widths(device, widths),
        found,
        DTYPE=given.dtypes[0],
        ALIGNED=given.aligned,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    sizes = [size for count in units for size in (count, -count % _ROWS)]
    for i, own in zip(full, found.split(sizes)[::2], strict=True):
        norms[i] = own.view(shapes[i])
    return norms


@kept
def _widths(device: torch.device, widths: tuple[int, ...]) -> Tensor:
    return on_device(widths, torch.int64, device)
