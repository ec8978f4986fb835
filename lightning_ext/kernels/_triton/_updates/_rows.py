"""Tensors as matrices (dimension 0, rest) inside a launch: tiles of rows, and states read by entry.

The tables are int64: `shapes`, for each tensor its rows, their width, what comes before its first
row in the rows of all, and whether it is a matrix, else its rows are only pieces of a vector;
`tiles`, for each program a tensor and one of its blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._kept import kept, on_device
from lightning_ext.kernels._triton._states._formats import (
    LOGARITHMS,
    NUMBERS,
    new_scales,
    state_addresses,
)

_PIECE = 512  # entries of a vector


class RowTables(NamedTuple):
    """Where the rows of a list of tensors are.

    Attributes:
        shapes: rows, width, first row and 1 for a matrix, of each tensor; shape (tensors, 4).
        tiles: tensor and block of rows of each program; shape (programs, 2).
        rows: of all tensors.
    """

    shapes: Tensor
    tiles: Tensor
    rows: int


def row_tables(shapes: Sequence[torch.Size], block: int, device: torch.device) -> RowTables:
    """Return the tables of a launch.

    Args:
        shapes: of the tensors.
        block: rows of a tile.
        device: of the launch.
    """
    return _build(device, tuple(shapes), block)


@kept
def _build(device: torch.device, shapes: tuple[torch.Size, ...], block: int) -> RowTables:
    entries, tiles, total = [], [], 0
    for i, shape in enumerate(shapes):
        matrix = len(shape) > 1
        width = shape[1:].numel() if matrix else _PIECE
        rows = shape[0] if matrix and width else -(-shape.numel() // _PIECE)
        entries.append([rows, width, total, matrix])
        tiles += [[i, k] for k in range(-(-rows // block))]
        total += rows
    shapes_table, tiles_table = (
        on_device(x, torch.int64, device).view(-1, n) for x, n in ((entries, 4), (tiles, 2))
    )
    return RowTables(shapes_table, tiles_table, total)


@triton.jit
def locate_rows(shapes, tiles, ROWS: tl.constexpr):
    """The tensor of this program, its rows, their width, its first row, and the tile's rows."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tiles + 2 * program)
    block = tl.load(tiles + 2 * program + 1)
    rows = tl.load(shapes + 4 * tensor)
    width = tl.load(shapes + 4 * tensor + 1)
    first = tl.load(shapes + 4 * tensor + 2)
    return tensor, rows, width, first, block * ROWS + tl.arange(0, ROWS)


@triton.jit
def rows_of(start, width, BLOCK: tl.constexpr):
    """The row of each of BLOCK entries from ``start`` on, and its place in it."""
    first, rest = start // width, start % width
    lane = tl.arange(0, BLOCK)
    if width >= BLOCK:  # then there is one end of a row at most
        down = (rest + lane >= width).to(tl.int32)
        across = rest + lane - down * width
    else:  # and no division of 64 bits in either
        narrow = width.to(tl.int32)
        down = (rest.to(tl.int32) + lane) // narrow
        across = (rest.to(tl.int32) + lane - down * narrow).to(tl.int64)
    return first + down, across


@triton.jit
def load_entries(tile, offsets, COLUMN: tl.constexpr, L: tl.constexpr):
    """Entries of a plain tensor in float32, 0 where the offset is not below its size."""
    table, count, tensor, _, size, _ = tile
    where = multi.address(table, count, COLUMN, tensor)
    code = multi.dtype_code(table, count, L.columns, COLUMN, tensor, L.dtypes[COLUMN])
    return multi.load(where, code, offsets, size, L.dtypes[COLUMN], False, True)


@triton.jit
def store_entries(tile, offsets, x, COLUMN: tl.constexpr, L: tl.constexpr):
    """Write them; return what a tensor of one dtype keeps."""
    table, count, tensor, _, size, _ = tile
    DTYPE: tl.constexpr = L.dtypes[COLUMN]
    where = multi.address(table, count, COLUMN, tensor)
    code = multi.dtype_code(table, count, L.columns, COLUMN, tensor, DTYPE)
    multi.store(where, code, offsets, size, x, DTYPE, False, True)
    if DTYPE is not None:
        return x.to(DTYPE).to(tl.float32)
    else:
        return x


@triton.jit
def load_state_entries(tile, offsets, COLUMN: tl.constexpr, L: tl.constexpr, WRITTEN: tl.constexpr):
    """Entries of a state in any format; WRITTEN: as in ``load_state_of``."""
    FORMAT: tl.constexpr = L.formats[COLUMN]
    if FORMAT == "tensor":
        return load_entries(tile, offsets, COLUMN, L)
    elif FORMAT == "bfloat16":
        table, count, tensor, _, size, _ = tile
        where = multi.address(table, count, COLUMN, tensor)
        return multi.load(where, 1, offsets, size, tl.bfloat16, False, True)
    else:
        return _load_decoded(tile, offsets, COLUMN, FORMAT, WRITTEN)


@triton.jit
def _load_decoded(tile, offsets, COLUMN: tl.constexpr, FORMAT: tl.constexpr, WRITTEN: tl.constexpr):
    table, count, tensor, _, size, books = tile
    codes, scales, width = state_addresses(table, count, COLUMN, tensor, FORMAT)
    if WRITTEN:
        scales = new_scales(table, count, COLUMN, tensor, FORMAT)
    scales = scales.to(tl.pointer_type(tl.float32))
    bytes = codes.to(tl.pointer_type(tl.uint8))
    inside = offsets < size
    PACKED: tl.constexpr = FORMAT == "int4_signed" or FORMAT == "int4_rank1"
    if PACKED:
        pair = tl.load(bytes + offsets // 2, mask=inside, other=0).to(tl.int32)
        found = (pair >> ((offsets & 1) * 4).to(tl.int32)) & 15
    else:
        found = tl.load(bytes + offsets, mask=inside, other=0).to(tl.int32)
    if FORMAT == "int4_rank1":
        width = tl.load(width.to(tl.pointer_type(tl.int64)))
        rows = (size + width - 1) // width
        row = tl.load(scales + offsets // width, mask=inside, other=0)
        column = tl.load(scales + rows + offsets % width, mask=inside, other=0)
        return (found + 1).to(tl.float32) * 0.0625 * tl.minimum(row, column)
    elif FORMAT == "fp8":
        group = 2 * (offsets // 128)
        most = tl.load(scales + group, mask=inside, other=0)
        power = tl.load(scales + group + 1, mask=inside, other=1)
        logarithm = tl.load((books + LOGARITHMS).to(tl.pointer_type(tl.float32)) + found)
        x = tl.exp2(logarithm * tl.div_rn(1.0 + 0 * power, power)) * most
        return x * (1 - (found >> 7) * 2).to(tl.float32)
    else:
        BOOK: tl.constexpr = 2 if PACKED else (1 if FORMAT == "int8_unsigned" else 0)
        WIDTH: tl.constexpr = 128 if PACKED else 256
        numbers = (books + (NUMBERS + BOOK * 2048)).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + offsets // WIDTH, mask=inside, other=0)
        return tl.load(numbers + found) * scale
