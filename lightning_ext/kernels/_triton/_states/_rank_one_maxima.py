"""The maxima of rows and columns that "int4" second moments are scaled by.

They are those of the new values, so they take a launch of their own before the one that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._kept import kept, on_device
from lightning_ext.kernels._triton._multi_tensor import address, dtype_code, load, tables
from lightning_ext.kernels._triton._states._formats import SMALLEST_SCALE, state_addresses

_ROWS, _COLUMNS = 32, 128


@triton.jit(do_not_specialize=["count"])
def rank_one_maxima_kernel(
    table,
    tiles,
    count,
    sign,
    beta2,
    rate2,
    weight_decay,
    clip,
    grad_scale,
    found_inf,
    UPDATE: tl.constexpr,
    COUPLED: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    P_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Columns: values or gradients, codes, scales, widths, maxima, which begin as zeros; params."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tiles + 3 * program)
    row = tl.load(tiles + 3 * program + 1).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.load(tiles + 3 * program + 2).to(tl.int64) * TILE_COLUMNS
    column += tl.arange(0, TILE_COLUMNS)
    size = tl.load(table + tensor)
    codes, scales, width = state_addresses(table, count, 1, tensor, "int4_rank1")
    width = tl.load(width.to(tl.pointer_type(tl.int64)))
    rows = (size + width - 1) // width
    in_rows, in_columns = row < rows, column < width
    offsets = row[:, None] * width + column[None, :]
    inside = in_columns[None, :] & (offsets < size)
    code = dtype_code(table, count, COLUMNS, 0, tensor, DTYPE)
    value = load(address(table, count, 0, tensor), code, offsets, size, DTYPE, ALIGNED, True)
    if UPDATE:
        value *= gradient_factor(sign, clip, grad_scale)
        if COUPLED:
            code = dtype_code(table, count, COLUMNS, 5, tensor, P_DTYPE)
            where = address(table, count, 5, tensor)
            weight = load(where, code, offsets, size, P_DTYPE, ALIGNED, True)
            value += tl.cast(weight_decay, tl.float32) * weight
        pointer = scales.to(tl.pointer_type(tl.float32))
        row_scale = tl.load(pointer + row, mask=in_rows, other=0)
        column_scale = tl.load(pointer + rows + column, mask=in_columns, other=0)
        scale = tl.minimum(row_scale[:, None], column_scale[None, :])
        byte = tl.load(codes.to(tl.pointer_type(tl.uint8)) + offsets // 2, mask=inside, other=0)
        found = (byte.to(tl.int32) >> ((offsets & 1) * 4).to(tl.int32)) & 15
        old = (found + 1).to(tl.float32) * 0.0625 * scale
        value = tl.cast(beta2, tl.float32) * old + tl.cast(rate2, tl.float32) * value * value
    value = tl.where(value == value, tl.abs(value), float("inf"))
    value = tl.where(inside & (value >= SMALLEST_SCALE), value, 0.0)
    row_most = tl.max(value, axis=1)
    column_most = tl.max(value, axis=0)
    if found_inf is not None:  # noqa: SIM102
        if tl.load(found_inf) != 0:
            row_most = row_scale
            column_most = column_scale
    # Numbers that are not negative are ordered as their bits are.
    maxima = address(table, count, 4, tensor).to(tl.pointer_type(tl.int32))
    bits = row_most.to(tl.int32, bitcast=True)
    tl.atomic_max(maxima + row, bits, mask=in_rows, sem="relaxed")
    bits = column_most.to(tl.int32, bitcast=True)
    tl.atomic_max(maxima + rows + column, bits, mask=in_columns, sem="relaxed")


@triton.jit
def gradient_factor(sign, clip, grad_scale):
    """What gradients are multiplied by: a number, and what pointers lead to or None."""
    factor = tl.cast(sign, tl.float32)
    if clip is not None:
        factor *= tl.load(clip).to(tl.float32)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float32)
    return factor


def rank_one_maxima(
    values: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    widths: Sequence[int],
    *,
    reduce: Sequence[Callable[[Tensor], Tensor] | None] = (),
    beta2: float | None = None,
    maximize: bool = False,
    params: Sequence[Tensor] | None = None,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Fill the last column of states with the maxima of what is about to be written.

    Args:
        values: those values, contiguous; with ``beta2`` the gradients g of new ones,
            β₂·v + (1 − β₂)·g².
        states: the columns of ``state_columns`` for "int4_rank1".
        widths: ``rank_one_width`` of each state.
        reduce: of each state; those that have one take maxima of columns over ranks.
        beta2: β₂.
        maximize: take −g for g.
        params: where ``weight_decay`` times them is added to g.
        weight_decay: its factor.
        clip: one number that g is multiplied by.
        grad_scale: one number that g is divided by.
        found_inf: one number; where it is not 0 the old scales are what is filled in.
    """
    weights = [] if params is None else [params]
    found = tables([values, *states, *weights], _ROWS * _COLUMNS)
    tiles = _tile_table(values[0].device, tuple(x.numel() for x in values), tuple(widths))
    if len(tiles):
        rank_one_maxima_kernel[(len(tiles),)](
            found.table,
            tiles,
            found.count,
            -1.0 if maximize else 1.0,
            0.0 if beta2 is None else beta2,
            0.0 if beta2 is None else 1 - beta2,
            weight_decay,
            clip,
            grad_scale,
            found_inf,
            UPDATE=beta2 is not None,
            COUPLED=params is not None,
            COLUMNS=found.columns,
            DTYPE=found.dtypes[0],
            P_DTYPE=found.dtypes[-1] if weights else None,
            ALIGNED=found.aligned,
            TILE_ROWS=_ROWS,
            TILE_COLUMNS=_COLUMNS,
            num_warps=8,
        )
    for maxima, width, share in zip(states[-1], widths, reduce, strict=False):
        if share is not None:
            columns = maxima[len(maxima) - width :]
            columns.copy_(share(columns))


@kept
def _tile_table(device: torch.device, sizes: tuple[int, ...], widths: tuple[int, ...]) -> Tensor:
    """Tensor, row and column of the tile of each program; shape (programs, 3), int32."""
    pairs = enumerate(zip(sizes, widths, strict=True))
    parts = [_tiles_of(i, -(-size // width), width) for i, (size, width) in pairs]
    return on_device(torch.cat(parts).tolist(), torch.int32, device)


def _tiles_of(tensor: int, rows: int, width: int) -> Tensor:
    ends = [torch.arange(-(-n // tile)) for n, tile in ((rows, _ROWS), (width, _COLUMNS))]
    return torch.cartesian_prod(torch.tensor([tensor]), *ends).view(-1, 3)
