"""States written from plain tensors and read into them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional import QuantizedState
from lightning_ext.kernels._triton._multi_tensor import address, load, locate, store, tables
from lightning_ext.kernels._triton._states._columns import (
    code_books,
    rank_one_width,
    state_columns,
    state_format,
)
from lightning_ext.kernels._triton._states._formats import (
    load_state,
    new_scales,
    state_addresses,
    store_state,
)
from lightning_ext.kernels._triton._states._rank_one_maxima import rank_one_maxima

_BLOCK = 1024


@triton.jit
def _encode(
    table, count, books, tensor, start, size, seed, step, stream,
    FORMAT: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = start + tl.arange(0, BLOCK)
    x = load(address(table, count, 0, tensor), 0, offsets, size, FROM, ALIGNED, MASKED)
    codes, scales, width = state_addresses(table, count, 1, tensor, FORMAT)
    scales = new_scales(table, count, 1, tensor, FORMAT)
    store_state(
        codes, scales, width, books, 0, start, size, x, seed, step, stream, FORMAT, TO, ALIGNED,
        MASKED, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "seed", "step", "stream"])
def encode_state_kernel(
    table, chunks, count, books, seed, step, stream,
    FORMAT: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start, size = locate(table, chunks, count, BLOCK)
    if start + BLOCK <= size:
        _encode(
            table, count, books, tensor, start, size, seed, step, stream, FORMAT, FROM, TO,
            ALIGNED, False, BLOCK,
        )  # fmt: skip
    else:
        _encode(
            table, count, books, tensor, start, size, seed, step, stream, FORMAT, FROM, TO,
            ALIGNED, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _decode(
    table, count, books, tensor, start, size,
    FORMAT: tl.constexpr,
    FROM: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    codes, scales, width = state_addresses(table, count, 1, tensor, FORMAT)
    x = load_state(
        codes, scales, width, books, 0, start, size, FORMAT, FROM, ALIGNED, MASKED, BLOCK
    )
    offsets = start + tl.arange(0, BLOCK)
    store(address(table, count, 0, tensor), 0, offsets, size, x, tl.float32, ALIGNED, MASKED)


@triton.jit(do_not_specialize=["count"])
def decode_state_kernel(
    table, chunks, count, books,
    FORMAT: tl.constexpr,
    FROM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start, size = locate(table, chunks, count, BLOCK)
    if start + BLOCK <= size:
        _decode(table, count, books, tensor, start, size, FORMAT, FROM, ALIGNED, False, BLOCK)
    else:
        _decode(table, count, books, tensor, start, size, FORMAT, FROM, ALIGNED, True, BLOCK)


def encode_state(
    x: Tensor, out: QuantizedState, *, seed: int = 0, step: int = 0, stream: int = 0
) -> None:
    """Launch the kernel; arguments as in ``functional.encode_state``, checked by the caller."""
    if not x.numel():
        return
    x, name = x.contiguous(), state_format(out)
    with state_columns([out]) as columns:
        if name == "int4_rank1":
            rank_one_maxima([x], columns, [rank_one_width(out)], reduce=[out.reduce])
        found = tables([[x], *columns], _BLOCK)
        encode_state_kernel[(found.programs,)](
            found.table,
            found.chunks,
            found.count,
            code_books(x.device),
            seed,
            step,
            stream,
            FORMAT=name,
            FROM=found.dtypes[0],
            TO=found.dtypes[1],
            ALIGNED=found.aligned,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def decode_state(state: QuantizedState) -> Tensor:
    """Launch the kernel; the argument as in ``functional.decode_state``, checked by the caller."""
    out = torch.empty(state.shape, dtype=torch.float32, device=state.codes.device)
    if not out.numel():
        return out
    with state_columns([state], written=False) as columns:
        found = tables([[out], *columns], _BLOCK)
        decode_state_kernel[(found.programs,)](
            found.table,
            found.chunks,
            found.count,
            code_books(out.device),
            FORMAT=state_format(state),
            FROM=found.dtypes[1],
            ALIGNED=found.aligned,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
