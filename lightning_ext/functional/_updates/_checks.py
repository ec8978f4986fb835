"""Options of updates of lists of parameters, and what such lists must be."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext.functional._numbers import check_number, on_device
from lightning_ext.functional._states._formats import QuantizedState
from lightning_ext.functional._updates._adam_directions import wide_dtype
from lightning_ext.functional._updates._entries import (
    Lists,
    check_columns,
    check_entries,
    check_overlaps,
    check_steps,
    storage,
)
from lightning_ext.functional._updates._settings import check_counts, check_streams

States = Sequence[Tensor | QuantizedState]

_DTYPE = attrgetter("dtype")
_IS_CPU = attrgetter("is_cpu")
_PLAIN = {Tensor, Parameter}


class UpdateOptions(TypedDict, total=False):
    """What every update of a list of parameters takes besides its own arguments.

    Attributes:
        grad_scale: a number, or a tensor of one entry on the CPU or the parameters' device, as the
            next two; gradients are divided by it first, as those of a scaled loss have to be.
        found_inf: where it is not 0 nothing changes. The step that was counted is the caller's to
            take back.
        clip: gradients are multiplied by it.
        weight_errors: of each parameter, in bfloat16, the error that ``split_weight`` returns; what
            is updated is the ``join_weight`` of both.
        rounding: how bfloat16 parameters without errors are rounded, "nearest" or "stochastic".
        seed: of the random bits; 64 bits.
        stream: of the random bits of the first parameter, each takes 4 of them; 32 bits.
    """

    grad_scale: Tensor | float | None
    found_inf: Tensor | float | None
    clip: Tensor | float | None
    weight_errors: Sequence[Tensor] | None
    rounding: Literal["nearest", "stochastic"]
    seed: int
    stream: int


class Options(NamedTuple):
    """``UpdateOptions`` with their defaults; numbers, once checked, are tensors."""

    grad_scale: Any = None
    found_inf: Any = None
    clip: Any = None
    weight_errors: Sequence[Tensor] | None = None
    rounding: str = "nearest"
    seed: int = 0
    stream: int = 0


class Checked(NamedTuple):
    """What ``check_lists`` returns.

    Attributes:
        lr: a number, or a tensor of no dimension where the parameters are.
        options: with numbers as tensors of no dimension.
        in_torch: whether all tensors are contiguous, on the CPU and of one dtype, float32 or
            float64, so that torch's own loops in C++ take them.
    """

    lr: Any
    options: Options
    in_torch: bool


def check_lists(
    op: str, lists: Lists, steps: Sequence[Tensor] | None, options: Options, lr: Tensor | float
) -> Checked:
    """Refuse lists and settings that do not fit together.

    Args:
        op: the operation's name.
        lists: parameters, gradients and states by name; the i-th ones of one shape and device.
        steps: of each parameter a tensor of one entry, or ``None``.
        options: of the call.
        lr: a number, or a tensor of one entry on the CPU or the parameters' device.

    Raises:
        ValueError: if lengths, shapes or devices differ, or an option is out of range.
        TypeError: for a dtype that has no update, or what is no list, tensor or number.
    """
    named = dict(lists)
    if options.weight_errors is not None:
        named["weight_errors"] = options.weight_errors
    given = named if steps is None else named | {"steps": steps}
    check_columns(op, given)
    _check_lengths(op, given)
    columns = list(named.values())
    plain = not is_traced() and _are_plain(columns)
    if not plain or (steps is not None and not _PLAIN.issuperset(map(type, steps))):
        check_entries(op, given)
    _check_options(op, options, steps, lists)
    rate, placed = _check_numbers(op, lr, options, columns[0])
    if not columns[0]:
        return Checked(rate, placed, in_torch=False)
    if steps is not None:
        check_steps(op, steps, columns[0])
        if not is_traced() and is_random(options, lists):
            check_counts(op, steps)
    if plain:
        dtypes = set().union(*(map(_DTYPE, column) for column in lists.values()))
    else:
        _check_shapes(op, named)
        _check_devices(op, columns)
        _check_signs(op, lists)
        dtypes = {x.dtype for column in lists.values() for x in column if isinstance(x, Tensor)}
    _check_dtypes(op, dtypes)
    contiguous = plain and all(all(map(Tensor.is_contiguous, column)) for column in columns)
    if not contiguous and not is_traced():
        check_overlaps(op, named)
    simple = options.weight_errors is None and dtypes in ({torch.float32}, {torch.float64})
    return Checked(rate, placed, in_torch=contiguous and simple)


def is_traced() -> bool:
    """Return whether ``torch.compile`` traces, which fuses plain operations itself."""
    return torch.compiler.is_compiling()


def _are_plain(columns: Sequence[Sequence[Any]]) -> bool:
    """Whether all are tensors on the CPU and the i-th ones of one shape; fast for small ones."""
    return (
        all(_PLAIN.issuperset(map(type, column)) for column in columns)
        and all(all(map(_IS_CPU, column)) for column in columns)
        and all(all(map(Tensor.is_same_size, columns[0], column)) for column in columns[1:])
    )


def _check_lengths(op: str, lists: Lists) -> None:
    (of, first), *others = lists.items()
    for name, column in others:
        if len(column) != len(first):
            raise ValueError(
                f"{op} got {len(first)} {of} and {len(column)} {name}; give one for each"
            )


def _check_shapes(op: str, lists: Lists) -> None:
    (of, first), *others = lists.items()
    for name, column in others:
        for i, (x, y) in enumerate(zip(first, column, strict=True)):
            if x.shape != y.shape:
                raise ValueError(
                    f"{op} got {of}[{i}] of shape {tuple(x.shape)} and {name}[{i}] of "
                    f"{tuple(y.shape)}; they must be equal"
                )


def _check_devices(op: str, columns: Sequence[Sequence[Any]]) -> None:
    for i, row in enumerate(zip(*columns, strict=True)):
        devices = {storage(x).device for x in row}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise ValueError(f"{op} got tensors of parameter {i} on {names}; bring them together")


def _check_signs(op: str, lists: Lists) -> None:
    for name in ("exp_avgs", "momentum_buffers"):
        states = [x for x in lists.get(name, ()) if isinstance(x, QuantizedState)]
        if not all(state.signed for state in states):
            raise ValueError(f"{op} got {name} in a format without a sign; they need signed=True")


def _check_dtypes(op: str, dtypes: set[torch.dtype]) -> None:
    wrong = sorted(str(dtype) for dtype in dtypes if not dtype.is_floating_point)
    if wrong:
        raise TypeError(
            f"{op} does not take {', '.join(wrong)}, but floating point; complex tensors can be "
            "given as torch.view_as_real of them"
        )


def _check_options(op: str, options: Options, steps: Sequence[Tensor] | None, lists: Lists) -> None:
    if options.rounding not in ("nearest", "stochastic"):
        raise ValueError(
            f"{op} got rounding={options.rounding!r}; choose 'nearest' or 'stochastic'"
        )
    params, *_ = lists.values()
    check_streams(op, options.seed, options.stream, len(params))
    if options.weight_errors is not None:
        wrong = {x.dtype for x in params} - {torch.bfloat16}
        wrong |= {x.dtype for x in options.weight_errors} - {torch.int8}
        if wrong:
            raise TypeError(
                f"{op} got {', '.join(sorted(map(str, wrong)))} among weights and weight_errors; "
                "these are torch.bfloat16 and torch.int8, as split_weight makes them"
            )
    if steps is None and is_random(options, lists):
        raise ValueError(f"{op} needs steps where it rounds at random: the bits go by them")


def _check_numbers(
    op: str, lr: Any, options: Options, params: Sequence[Tensor]
) -> tuple[Any, Options]:
    """Rate and options, each on the parameters' device; the CPU's ``found_inf`` stays there."""
    names = [x for x in ("grad_scale", "found_inf", "clip") if getattr(options, x) is not None]
    if not names and isinstance(lr, (int, float)):
        return lr, options
    devices = {x.device for x in params}
    cpu = torch.device("cpu")
    place = next(iter(devices)) if len(devices) == 1 else cpu
    dtype = wide_dtype(*params[:1])
    rate = check_number(op, "lr", lr, devices)
    placed: dict[str, Any] = {}
    for name in names:
        value = check_number(op, name, getattr(options, name), devices)
        at_hand = name == "found_inf" and not (isinstance(value, Tensor) and not value.is_cpu)
        placed[name] = on_device(value, cpu if at_hand else place, dtype)
    if isinstance(rate, Tensor):
        rate = on_device(rate, place, dtype)
    return rate, options._replace(**placed)


def is_random(options: Options, lists: Lists) -> bool:
    """Return whether something is rounded at random.

    Args:
        options: of the call.
        lists: parameters, gradients and states by name.
    """
    if options.rounding == "stochastic":
        return True
    states = [x for column in lists.values() for x in column if isinstance(x, QuantizedState)]
    return any(state.format == "bfloat16" for state in states)
