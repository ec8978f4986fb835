"""The lists that a launch works on as one constant, and tiles of them inside of it.

A tile is BLOCK consecutive entries of one parameter and what belongs to it: a tuple (table, count,
tensor, start, size, books). Each list is known by its first column: plain tensors have one, states
in few bits several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._states._formats import state_width
from lightning_ext.functional._updates._adam_directions import STREAMS as _STREAMS
from lightning_ext.functional._updates._checks import Options
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._states._columns import (
    State,
    code_books,
    state_columns,
    state_format,
)
from lightning_ext.kernels._triton._states._formats import (
    load_state,
    new_scales,
    state_addresses,
    store_state,
)
from lightning_ext.kernels._triton._states._rank_one_maxima import gradient_factor, rank_one_maxima

STREAMS = tl.constexpr(_STREAMS)
_BOOKLESS = ("tensor", "bfloat16")


class Layout(NamedTuple):
    """What a kernel knows of its columns when it is compiled.

    Attributes:
        states: the first column of each list of states.
        formats: of each column, where a state begins.
        dtypes: of each column, ``None`` where they are mixed or no floats.
        columns: how many there are.
        aligned: whether all addresses are multiples of 16 bytes.
        block: entries of a tile.
        weight: how weights are kept, a name in ``_weights``.
        errors: the column of their errors.
    """

    states: tuple[int, ...]
    formats: tuple[str | None, ...]
    dtypes: tuple[Any, ...]
    columns: int
    aligned: bool
    block: int
    weight: str = "nearest"
    errors: int | None = None

    @property
    def keeps(self) -> bool:
        """Whether it is known without a look what states keep of a value."""
        return all(self.formats[i] == "tensor" and self.dtypes[i] is not None for i in self.states)


class Launch(NamedTuple):
    """What every launch over the same lists is given.

    Attributes:
        tables: of the lists.
        books: code books of the states' formats.
        layout: of the columns.
        scaling: −1 or 1, and what options have of ``clip``, ``grad_scale`` and ``found_inf``.
        random: seed and first stream of random bits.
    """

    tables: multi.Tables
    books: Tensor
    layout: Layout
    scaling: tuple[float, Tensor | None, Tensor | None, Tensor | None]
    random: tuple[int, int]


@triton.jit
def grad_factor(scaling):
    """What gradients are multiplied by."""
    return gradient_factor(scaling[0], scaling[1], scaling[2])


@triton.jit
def is_left_out(scaling):
    """Whether infinities were found, so that nothing is to change."""
    found = False
    if scaling[3] is not None:
        found = tl.load(scaling[3]) != 0
    return found


@triton.jit
def number(x, ON_DEVICE: tl.constexpr):
    """A scalar argument in float32: a number, or a tensor of one entry."""
    if ON_DEVICE:
        return tl.load(x).to(tl.float32)
    else:
        return tl.cast(x, tl.float32)


@triton.jit
def offsets_of(tile, L: tl.constexpr):
    """The entries of a tile, int64[BLOCK]."""
    return tile[3] + tl.arange(0, L.block)


@triton.jit
def load_column(tile, COLUMN: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr):
    """A tile of plain tensors in float32, 0 behind the end."""
    table, count, tensor, _, size, _ = tile
    where = multi.address(table, count, COLUMN, tensor)
    code = multi.dtype_code(table, count, L.columns, COLUMN, tensor, L.dtypes[COLUMN])
    offsets = offsets_of(tile, L)
    return multi.load(where, code, offsets, size, L.dtypes[COLUMN], L.aligned, MASKED)


@triton.jit
def load_count(tile, COLUMN: tl.constexpr):
    """The steps of a parameter, int64, out of the column that counts them."""
    where = multi.address(tile[0], tile[1], COLUMN, tile[2])
    return tl.load(where.to(tl.pointer_type(tl.float32))).to(tl.int64)


@triton.jit
def store_column(tile, x, COLUMN: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr):
    """Write a tile of plain tensors."""
    table, count, tensor, _, size, _ = tile
    where = multi.address(table, count, COLUMN, tensor)
    code = multi.dtype_code(table, count, L.columns, COLUMN, tensor, L.dtypes[COLUMN])
    offsets = offsets_of(tile, L)
    multi.store(where, code, offsets, size, x, L.dtypes[COLUMN], L.aligned, MASKED)


@triton.jit
def load_state_of(
    tile, COLUMN: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr, WRITTEN: tl.constexpr
):
    """A tile of states in float32; behind the end it means nothing.

    WRITTEN: whether this launch comes after the one that has written them.
    """
    table, count, tensor, start, size, books = tile
    FORMAT: tl.constexpr = L.formats[COLUMN]
    DTYPE: tl.constexpr = L.dtypes[COLUMN]
    codes, scales, width = state_addresses(table, count, COLUMN, tensor, FORMAT)
    if WRITTEN:
        scales = new_scales(table, count, COLUMN, tensor, FORMAT)
    code = multi.dtype_code(table, count, L.columns, COLUMN, tensor, DTYPE)
    return load_state(
        codes, scales, width, books, code, start, size, FORMAT, DTYPE, L.aligned, MASKED, L.block
    )


@triton.jit
def store_state_of(
    tile, x, bits, WHICH: tl.constexpr, COLUMN: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr
):
    """Write a tile of states; return what is kept of it where ``L.keeps``.

    bits: seed, step and stream that "bfloat16" is rounded by. WHICH: the number of the state.
    """
    table, count, tensor, start, size, books = tile
    FORMAT: tl.constexpr = L.formats[COLUMN]
    DTYPE: tl.constexpr = L.dtypes[COLUMN]
    codes, scales, width = state_addresses(table, count, COLUMN, tensor, FORMAT)
    scales = new_scales(table, count, COLUMN, tensor, FORMAT)
    code = multi.dtype_code(table, count, L.columns, COLUMN, tensor, DTYPE)
    seed, step, stream = bits
    stream = stream + STREAMS * tensor + 1 + WHICH
    store_state(
        codes, scales, width, books, code, start, size, x, seed, step, stream, FORMAT, DTYPE,
        L.aligned, MASKED, L.block,
    )  # fmt: skip
    if FORMAT == "tensor" and DTYPE is not None:
        return x.to(DTYPE).to(tl.float32)
    else:
        return x


@contextmanager
def launch_over(
    tensors: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[State]],
    block: int,
    options: Options,
    *,
    maximize: bool,
    others: Sequence[Sequence[Tensor]] = (),
    beta2: float = 0.0,
    row_major: bool = False,
) -> Iterator[Launch]:
    """Give what launches over some lists need; their columns are in this order.

    Args:
        tensors: parameters, which are written, then gradients, of the same shapes.
        others: lists of other shapes, such as counts of steps.
        states: lists of plain tensors or ``QuantizedState`` of those shapes; written.
        block: entries of a tile.
        options: of the call; its tensors of one entry on the device.
        maximize: take −g for g.
        beta2: β₂ of the second moments, whose new scales are found before if they are "int4".
        row_major: whether the kernels know which row an entry is in.
    """
    scaling = -1.0 if maximize else 1.0, options.clip, options.grad_scale, options.found_inf
    formats = [state_format(x[0]) for x in states]
    plain = [list(x) for x, name in zip(states, formats, strict=True) if name == "tensor"]
    given: list[list[Any]] = [[getattr(y, "codes", y) for y in x] for x in plain]
    weight = weight_kind(tensors[0], options)
    errors = [] if options.weight_errors is None else [options.weight_errors]
    columns = [*tensors, *given, *errors]
    written = [0, *range(len(tensors), len(columns))]
    row_major = row_major or len(plain) < len(states) or weight == "stochastic"
    with multi.flat(columns, written=written, row_major=row_major) as flat, ExitStack() as stack:
        ready = list(flat[len(tensors) :])
        found = [*flat[: len(tensors)], *others]
        firsts: list[int] = []
        names: list[str | None] = [None] * len(found)
        for state, name in zip(states, formats, strict=True):
            some = [ready.pop(0)] if name == "tensor" else stack.enter_context(state_columns(state))
            if name == "int4_rank1":
                widths = [state_width(x.shape, "int4", False) for x in tensors[0]]
                shares = [getattr(x, "reduce", None) for x in state]
                rank_one_maxima(
                    flat[1],
                    some,
                    widths,
                    reduce=shares,
                    beta2=beta2,
                    clip=options.clip,
                    grad_scale=options.grad_scale,
                    found_inf=options.found_inf,
                )
            firsts.append(len(found))
            names += [name] + [None] * (len(some) - 1)
            found += some
        place = len(found) if errors else None
        found += ready  # errors of weights
        names += [None] * len(ready)
        tables = multi.tables(found, block)
        layout = Layout(
            tuple(firsts),
            tuple(names),
            tables.dtypes,
            len(found),
            tables.aligned,
            block,
            weight,
            place,
        )
        books = _books(formats, tables.table.device)
        yield Launch(tables, books, layout, scaling, (options.seed, options.stream))


def weight_kind(params: Sequence[Tensor], options: Options) -> str:
    """Return how weights are kept, a name in ``_weights``."""
    if options.weight_errors is not None:
        return "errors"
    random = options.rounding == "stochastic" and any(x.dtype == torch.bfloat16 for x in params)
    return "stochastic" if random else "nearest"


def _books(formats: Sequence[str], device: torch.device) -> Tensor:
    if all(name in _BOOKLESS for name in formats):
        return torch.empty(0, dtype=torch.uint8, device=device)  # nothing is read
    return code_books(device)
