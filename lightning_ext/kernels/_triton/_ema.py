"""Moving averages of lists of tensors: a launch for up to four decays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton import _multi_tensor as multi

_BLOCK = 4096
_AT_ONCE = 4  # averages; the values are read once for each so many


@triton.jit
def _weight(decay, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        return (1 - tl.load(decay).to(tl.float64)).to(tl.float32)
    else:
        return tl.cast(decay, tl.float32)


@triton.jit
def _move(
    table,
    count,
    column: tl.constexpr,
    tensor,
    offsets,
    size,
    x,
    weight,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    where = multi.address(table, count, column, tensor)
    average = multi.load(where, 0, offsets, size, tl.float32, ALIGNED, MASKED)
    # From the nearer end, as torch's lerp.
    near = average + weight * (x - average)
    far = x - (x - average) * (1 - weight)
    moved = tl.where(weight < 0.5, near, far)
    moved = tl.where(weight == 0, average, tl.where(weight == 1, x, moved))
    multi.store(where, 0, offsets, size, moved, tl.float32, ALIGNED, MASKED)


@triton.jit
def _chunk(
    table,
    count,
    tensor,
    offsets,
    size,
    w0,
    w1,
    w2,
    w3,
    AVERAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    code = multi.dtype_code(table, count, 1 + AVERAGES, 0, tensor, DTYPE)
    where = multi.address(table, count, 0, tensor)
    x = multi.load(where, code, offsets, size, DTYPE, ALIGNED, MASKED)
    _move(table, count, 1, tensor, offsets, size, x, w0, ALIGNED, MASKED)
    if AVERAGES > 1:
        _move(table, count, 2, tensor, offsets, size, x, w1, ALIGNED, MASKED)
    if AVERAGES > 2:
        _move(table, count, 3, tensor, offsets, size, x, w2, ALIGNED, MASKED)
    if AVERAGES > 3:
        _move(table, count, 4, tensor, offsets, size, x, w3, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["count"])
def ema_update_kernel(
    table,
    chunks,
    count,
    d0,
    d1,
    d2,
    d3,
    AVERAGES: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = multi.locate(table, chunks, count, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    w0, w1 = _weight(d0, ON_DEVICE), _weight(d1, ON_DEVICE)
    w2, w3 = _weight(d2, ON_DEVICE), _weight(d3, ON_DEVICE)
    if start + BLOCK <= size:
        _chunk(table, count, tensor, offsets, size, w0, w1, w2, w3, AVERAGES, DTYPE, ALIGNED, False)
    else:
        _chunk(table, count, tensor, offsets, size, w0, w1, w2, w3, AVERAGES, DTYPE, ALIGNED, True)


def ema_update_(
    averages: Sequence[Sequence[Tensor]],
    values: Sequence[Tensor],
    decays: Sequence[float | Tensor],
) -> None:
    """Launch the kernel; the caller has checked what it gives.

    Args:
        averages: a list in float32 for each decay.
        values: in float32, bfloat16 or float16, mixed as they come.
        decays: all of them numbers, or all of them tensors on the device of the values.
    """
    for start in range(0, len(averages), _AT_ONCE) if values else ():
        some = slice(start, start + _AT_ONCE)
        columns = [values, *averages[some]]
        with multi.flat(columns, written=range(1, len(columns))) as flat:
            _launch(flat, list(decays[some]))


def _launch(columns: multi.Columns, decays: list[float | Tensor]) -> None:
    given = multi.tables(columns, _BLOCK)
    if not given.programs:
        return
    on_device = isinstance(decays[0], Tensor)
    each: list[Any] = decays if on_device else [1.0 - decay for decay in decays]
    each = each + each[:1] * (_AT_ONCE - len(each))  # those behind AVERAGES count for nothing
    ema_update_kernel[(given.programs,)](
        given.table,
        given.chunks,
        given.count,
        *each,
        AVERAGES=len(decays),
        ON_DEVICE=on_device,
        DTYPE=given.dtypes[0],
        ALIGNED=given.aligned,
        BLOCK=_BLOCK,
        num_warps=8,
    )
