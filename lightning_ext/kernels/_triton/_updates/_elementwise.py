"""Elementwise optimizer updates: one launch over all parameters, whatever the rule.

Columns: parameters, gradients, those of each state, counts of steps, errors of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional import QuantizedState
from lightning_ext.functional._updates._checks import Options
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._kept import kept, on_device
from lightning_ext.kernels._triton._states._columns import (
    State,
    code_books,
    rank_one_width,
    state_columns,
    state_format,
)
from lightning_ext.kernels._triton._states._rank_one_maxima import gradient_factor, rank_one_maxima
from lightning_ext.kernels._triton._updates._layout import (
    STREAMS,
    Layout,
    load_column,
    load_state_of,
    number,
    offsets_of,
    store_state_of,
    weight_kind,
)
from lightning_ext.kernels._triton._updates._rules import apply_rule
from lightning_ext.kernels._triton._updates._weights import load_weight, store_weight

_BLOCK = 2048
_WARPS = 8


@triton.jit
def _update_tile(
    tile,
    lr,
    factor,
    step,
    seed,
    stream,
    place,
    numbers,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    L: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Read a tile, apply the rule, write it; place: that of the parameter in the caller's list."""
    g = load_column(tile, 1, L, MASKED) * factor
    w = load_weight(tile, offsets_of(tile, L), L, MASKED)
    s0, s1 = g, g
    if STATES > 0:
        s0 = load_state_of(tile, L.states[0], L, MASKED, False)
    if STATES > 1:
        s1 = load_state_of(tile, L.states[1], L, MASKED, False)
    w, s0, s1 = apply_rule(w, g, s0, s1, step, lr, numbers, RULE)
    # To the stream its parameter's number in this launch is added.
    bits = (seed, step.to(tl.int64), stream + STREAMS * (place - tile[2]))
    store_weight(tile, offsets_of(tile, L), w, bits, L, MASKED)
    if STATES > 0:
        store_state_of(tile, s0, bits, 0, L.states[0], L, MASKED)
    if STATES > 1:
        store_state_of(tile, s1, bits, 1, L.states[1], L, MASKED)


@triton.jit(do_not_specialize=["count", "seed", "stream"])
def update_kernel(
    table,
    chunks,
    count,
    books,
    places,
    lr,
    sign,
    clip,
    grad_scale,
    found_inf,
    seed,
    stream,
    numbers,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    STEPS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    L: tl.constexpr,
):
    if found_inf is not None:  # noqa: SIM102
        if tl.load(found_inf) != 0:
            return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    factor = gradient_factor(sign, clip, grad_scale)
    rate = number(lr, LR_ON_DEVICE)
    step = tl.cast(2.0, tl.float32)
    if STEPS is not None:
        step = tl.load(multi.address(table, count, STEPS, tensor).to(tl.pointer_type(tl.float32)))
    place = tensor.to(tl.int64)
    if places is not None:
        place = tl.load(places + tensor)
    if start + L.block <= size:
        _update_tile(
            tile, rate, factor, step, seed, stream, place, numbers,
            RULE, STATES, L, False,
        )  # fmt: skip
    else:
        _update_tile(
            tile, rate, factor, step, seed, stream, place, numbers,
            RULE, STATES, L, True,
        )  # fmt: skip


class Call(NamedTuple):
    """What a launch is given besides lists.

    Attributes:
        rule: a name in ``apply_rule``.
        numbers: what the rule takes besides the rate.
        lr: a number, or a tensor of one entry on the device.
        maximize: take −g for g.
        options: of the call, checked; its tensors of one entry on the device.
    """

    rule: str
    numbers: tuple[float, ...]
    lr: Tensor | float
    maximize: bool
    options: Options


class _Lists(NamedTuple):
    """Of each parameter its tensors; states as they were given."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: list[Sequence[State]]
    steps: Sequence[Tensor] | None
    errors: Sequence[Tensor] | None


def update_(
    call: Call,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[State]],
    steps: Sequence[Tensor] | None,
) -> None:
    """Launch a rule, once for each combination of formats that weights and states have.

    Args:
        call: the rule and its settings.
        params: parameters.
        grads: gradients.
        states: up to two lists of states.
        steps: float32 on the device, where the rule or random bits need them.
    """
    lists = _Lists(params, grads, list(states), steps, call.options.weight_errors)
    kinds = [_kind(*row, options=call.options) for row in zip(params, *states, strict=True)]
    for kind in dict.fromkeys(kinds):
        places = [i for i, found in enumerate(kinds) if found == kind]
        if len(places) == len(kinds):
            _launch(call, kind, lists, None)
        else:
            device = params[0].device
            _launch(call, kind, _pick(lists, places), _places(device, tuple(places)))


def _kind(param: Tensor, *states: State, options: Options) -> tuple[str, ...]:
    """How the weight of a parameter is kept, and the formats of its states."""
    return (weight_kind([param], options), *map(state_format, states))


def _pick(lists: _Lists, places: list[int]) -> _Lists:
    def pick(column: Sequence[Any]) -> list[Any]:
        return [column[i] for i in places]

    steps = None if lists.steps is None else pick(lists.steps)
    errors = None if lists.errors is None else pick(lists.errors)
    states: list[Sequence[State]] = [pick(column) for column in lists.states]
    return _Lists(pick(lists.params), pick(lists.grads), states, steps, errors)


@kept
def _places(device: torch.device, places: tuple[int, ...]) -> Tensor:
    return on_device(places, torch.int64, device)


def _launch(call: Call, kind: tuple[str, ...], lists: _Lists, places: Tensor | None) -> None:
    (weight, *formats), o = kind, call.options
    with ExitStack() as stack:
        columns, at = _lay_out(lists, kind, stack)
        found = multi.tables(columns, _BLOCK)
        states = tuple(i for i in at[:2] if i is not None)
        names: list[str | None] = [None] * len(columns)
        for i, name in zip(states, formats, strict=True):
            names[i] = name
        if formats[1:] == ["int4_rank1"]:
            _find_maxima(call, columns, states[1], lists.states[1])
        if not found.programs:
            return
        layout = Layout(
            states, tuple(names), found.dtypes, len(columns), found.aligned, _BLOCK, weight, at[3]
        )
        update_kernel[(found.programs,)](
            found.table,
            found.chunks,
            found.count,
            code_books(columns[0][0].device),
            places,
            call.lr,
            -1.0 if call.maximize else 1.0,
            o.clip,
            o.grad_scale,
            o.found_inf,
            o.seed,
            o.stream,
            call.numbers,
            RULE=call.rule,
            STATES=len(states),
            STEPS=at[2],
            LR_ON_DEVICE=isinstance(call.lr, Tensor),
            L=layout,
            num_warps=_WARPS,
        )


def _lay_out(
    lists: _Lists, kind: tuple[str, ...], stack: ExitStack
) -> tuple[list[Sequence[Tensor]], list[int | None]]:
    """All columns, and where those of two states, of steps and of errors begin."""
    weight, *formats = kind
    columns: list[Sequence[Tensor]] = [lists.params, lists.grads]
    at: list[int | None] = [None] * 4
    alike, written = [0, 1], [0]
    for i, (states, name) in enumerate(zip(lists.states, formats, strict=True)):
        at[i] = len(columns)
        if name == "tensor":
            alike.append(len(columns))
            written.append(len(alike) - 1)
            columns.append([x if isinstance(x, Tensor) else x.codes for x in states])
        else:
            columns += stack.enter_context(state_columns(states))
    for i, column in ((2, lists.steps), (3, lists.errors)):
        if column is not None:
            at[i] = len(columns)
            columns.append(column)
    if lists.errors is not None:
        alike.append(len(columns) - 1)
        written.append(len(alike) - 1)
    # The order of memory will do where an entry's place has no meaning.
    row_major = weight == "stochastic" or any(name != "tensor" for name in formats)
    order = multi.flat([columns[i] for i in alike], written=written, row_major=row_major)
    for i, column in zip(alike, stack.enter_context(order), strict=True):
        columns[i] = column
    return columns, at


def _find_maxima(
    call: Call, columns: list[Sequence[Tensor]], at: int, states: Sequence[State]
) -> None:
    """The launch that second moments in "int4_rank1" take before."""
    o = call.options
    is_coupled = call.rule == "adam"
    quantized = [x for x in states if isinstance(x, QuantizedState)]
    rank_one_maxima(
        columns[1],
        columns[at : at + 4],
        [rank_one_width(x) for x in quantized],
        reduce=[x.reduce for x in quantized],
        beta2=call.numbers[2],
        params=columns[0] if is_coupled else None,
        weight_decay=call.numbers[7] if is_coupled else 0.0,
        maximize=call.maximize,
        clip=o.clip,
        grad_scale=o.grad_scale,
        found_inf=o.found_inf,
    )
