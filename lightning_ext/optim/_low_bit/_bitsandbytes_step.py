"""What bitsandbytes' 8-bit step is given: numbers known to the CPU, flat tensors, code books."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_ext._require import require
from lightning_ext.functional import QuantizedState, decode_state, encode_state

Lists = Mapping[str, Sequence[Any]]
Row = tuple[Any, ...]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 256  # entries that share a scale
_LATE = 2**31 - 1  # a count of steps at which bitsandbytes' bias corrections are 1
_SPANS = {"cpu": 1 << 16, "cuda": 1 << 30}  # what a core's cache holds; what 32 bits count
_BINS = 65535  # of [−1, 1], by which its step on a CPU finds codes; none of them is at 0


class UpdateOptions(TypedDict, total=False):
    """What ``kernels.adamw_update_`` takes besides; seed and stream are of no use to nearest."""

    grad_scale: Tensor | float | None
    found_inf: Tensor | float | None
    clip: Tensor | float | None
    weight_errors: Sequence[Tensor] | None
    rounding: Literal["nearest", "stochastic"]
    seed: int
    stream: int


class Numbers(NamedTuple):
    """What a step of bitsandbytes is given besides tensors.

    Attributes:
        betas: β₁ and β₂.
        lr: rate.
        eps: ε.
        weight_decay: λ.
        grad_factor: what gradients are multiplied by.
    """

    betas: tuple[float, float]
    lr: float
    eps: float
    weight_decay: float
    grad_factor: float


class Read(NamedTuple):
    """Rate, factor of gradients and counts of steps of a call."""

    lr: float
    grad_factor: float
    steps: list[float]


def check_options(op: str, options: UpdateOptions) -> None:
    """Refuse weights that are not rounded to nearest.

    Args:
        op: the operation's name.
        options: of the call.

    Raises:
        ValueError: if there are some.
    """
    if options.get("weight_errors") is not None or options.get("rounding", "nearest") != "nearest":
        raise ValueError(f"{op} of bitsandbytes rounds weights to nearest alone")


def rows_of(op: str, lists: Lists, steps: Sequence[Tensor] | None) -> tuple[list[Row], list[Row]]:
    """Return the rows of lists whose moments are in 8 bits, and those of others, in float32.

    Args:
        op: the operation's name.
        lists: parameters, gradients and moments by name.
        steps: counts, the last of a row, where they are needed.

    Raises:
        ValueError: if lengths or shapes differ, or a moment has another format.
        TypeError: for dtypes that bitsandbytes does not have.
    """
    columns = dict(lists) if steps is None else {**lists, "steps": steps}
    if len({len(column) for column in columns.values()}) > 1:
        given = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"{op} got {given}; give one for each parameter")
    eight, others = [], []
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        moments = row[2 : len(lists)]
        formats = {x.format if isinstance(x, QuantizedState) else "tensor" for x in moments}
        if formats == {"int8"}:
            _check_row(f"{op} of bitsandbytes got for parameter {i}", row, moments)
            eight.append(row)
        elif formats <= {"tensor", "float32"}:
            others.append(row)
        else:
            named = " and ".join(sorted(formats))
            raise ValueError(
                f"{op} of bitsandbytes got moments in {named} for parameter {i}; all of them are in"
                " 'int8', or none is and all are in float32"
            )
    return eight, others


def read(
    lr: Tensor | float, options: UpdateOptions, steps: Sequence[Tensor], *, maximize: bool
) -> Read | None:
    """Return the numbers of a call, ``None`` where its step is left out; waits for a device once.

    Args:
        lr: rate.
        options: ``grad_scale``, ``found_inf`` and ``clip``.
        steps: counts.
        maximize: take the other sign of gradients.
    """
    given: dict[str, Any] = {"clip": 1.0, "grad_scale": 1.0, "found_inf": 0.0}
    given |= {name: x for name, x in options.items() if name in given and x is not None}
    rate, clip, scale, infinite, *counts = _values([lr, *given.values(), *steps])
    if infinite:
        return None
    return Read(rate, clip / scale * (-1 if maximize else 1), counts)


def folded(op: str, step: float, given: Numbers, *, decay_last: bool) -> Numbers:
    """Return the numbers by which bitsandbytes' step at a late count is AdamW's at another.

    With c = 1 − βᵗ,  η/c₁·m/(√v/√c₂ + ε) = (η√c₂/c₁)·m/(√v + ε√c₂).  Where the decay comes last,
    (w − η′u)(1 − ηλ) is (1 − ηλ)w − ηu for η′ = η/(1 − ηλ).

    Args:
        op: the operation's name.
        step: count, a fraction also.
        given: of AdamW.
        decay_last: as bitsandbytes has it on CUDA.

    Raises:
        ValueError: if there was no step, or where the decay leaves nothing of a weight.
    """
    if not step > 0:
        raise ValueError(f"{op} got a count of {step} steps; count this one before, from 1 on")
    first, second = (-math.expm1(step * math.log(x)) if x else 1.0 for x in given.betas)
    rate, decay = given.lr * math.sqrt(second) / first, given.lr * given.weight_decay
    if decay_last and decay:
        if decay >= 1:
            raise ValueError(f"{op} of bitsandbytes got lr·weight_decay={decay}; it must be < 1")
        rate /= 1 - decay
    decay = decay / rate if rate else 0.0
    return given._replace(lr=rate, eps=given.eps * math.sqrt(second), weight_decay=decay)


def update(
    name: str, param: Tensor, grad: Tensor, states: Sequence[QuantizedState], numbers: Numbers
) -> None:
    """Do bitsandbytes' step of one parameter, in place.

    Args:
        name: "adam" or "lion".
        param: w.
        grad: g, in its dtype or a narrower one.
        states: m, and v where there is one.
        numbers: of the step.
    """
    step = require("bitsandbytes.functional", "bnb").optimizer_update_8bit_blockwise
    weight = param.detach().contiguous().view(-1)
    slope = grad.detach().to(param.dtype).contiguous().view(-1)
    maps = [_map(x.signed, param.device) for x in states]
    for span, blocks in _spans(param):
        codes = [_part(x.codes, span) for x in states]
        scales = [x.scales[blocks] for x in states]
        step(
            name,
            slope[span],
            weight[span],
            *_pair(codes),
            *numbers.betas,
            *(0.0, 0.0),  # of an optimizer with three moments
            numbers.eps,
            _LATE,
            numbers.lr,
            *_pair(maps),
            *_pair(scales),
            numbers.weight_decay,
            numbers.grad_factor,
        )
        if param.is_cpu:
            _put_zeros_back(codes[0])
    if not param.is_contiguous():
        param.copy_(weight.view(param.shape))


def finish(rows: Iterable[Row]) -> None:
    """Tell autograd that parameters have changed, and wait for states in pages.

    Args:
        rows: parameters, gradients and states.
    """
    devices = set()
    for param, _, *moments in rows:
        increment_version(param)
        if any(is_paged(x.codes) for x in moments):
            devices.add(param.device)
    for device in devices:
        torch.cuda.synchronize(device)


def is_paged(codes: Tensor) -> bool:
    """Return whether codes are in bitsandbytes' pages."""
    return getattr(codes, "is_paged", False)


def _check_row(where: str, row: Row, moments: Sequence[QuantizedState]) -> None:
    param, grad = row[:2]
    if param.device.type not in _SPANS:
        raise ValueError(f"{where} a tensor on {param.device}; it takes 'cpu' and 'cuda'")
    if param.dtype not in _DTYPES or torch.promote_types(grad.dtype, param.dtype) != param.dtype:
        raise TypeError(
            f"{where} a weight in {param.dtype} and a gradient in {grad.dtype}; it takes float32,"
            " float16 and bfloat16, and gradients of the same dtype or a narrower one"
        )
    if param.shape != grad.shape:
        raise ValueError(f"{where} shapes {tuple(param.shape)} and {tuple(grad.shape)}")
    for x, signed in zip(moments, (True, False), strict=False):
        if (tuple(x.shape), x.signed) != (tuple(param.shape), signed):
            raise ValueError(
                f"{where} a weight of shape {tuple(param.shape)} and a moment of {tuple(x.shape)}"
                f" with signed={x.signed}; the shapes must be equal, and m has a sign, v none"
            )
        if x.scales.shape != (-(-param.numel() // _BLOCK),) or x.codes.shape != param.shape:
            raise ValueError(f"{where} a moment whose codes and scales do not belong to its shape")
        if x.scales.dtype != torch.float32 or not x.codes.is_contiguous():
            raise TypeError(
                f"{where} a moment with scales in {x.scales.dtype} and codes of strides"
                f" {x.codes.stride()}; it takes float32 and contiguous codes"
            )


def _values(numbers: Sequence[Any]) -> list[float]:
    """What numbers are; those on a device are read in one copy."""
    found = [0.0 if isinstance(x, Tensor) else float(x) for x in numbers]
    for device in {x.device for x in numbers if isinstance(x, Tensor)}:
        places = [i for i, x in enumerate(numbers) if isinstance(x, Tensor) and x.device == device]
        values = torch.stack([numbers[i].detach().reshape(()) for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return found


def _spans(param: Tensor) -> Iterator[tuple[slice, slice]]:
    """Entries, and their blocks, of a parameter's parts: as many as a cache holds on a CPU."""
    size, count = _SPANS[param.device.type], param.numel()
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), slice(start // _BLOCK, -(-stop // _BLOCK))


def _part(codes: Tensor, span: slice) -> Tensor:
    """A part of flat codes, in pages where these are, which are fetched."""
    part = codes.view(-1)[span]
    if is_paged(codes):
        marked: Any = part
        marked.is_paged, marked.page_deviceid = True, codes.page_deviceid  # type: ignore[attr-defined] # set by bitsandbytes
        require("bitsandbytes.functional", "bnb").prefetch_tensor(part)
    return part


def _pair(found: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return found[0], found[1] if len(found) > 1 else None


def _put_zeros_back(codes: Tensor) -> None:
    """Give 0 its code again, and what else is in the two bins next to it."""
    codes.copy_(_mended_codes().index_select(0, codes.int()))


@cache
def _mended_codes() -> Tensor:
    """Of each code what it is to be."""
    about = torch.tensor([0.0, 1 / _BINS, -1 / _BINS, 1.0])  # of which 1 is the scale
    zero, above, below, _ = encode_state(about, "int8").codes.tolist()
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[above, below]] = zero
    return codes


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The numbers of all codes."""
    codes = torch.arange(256, dtype=torch.uint8)
    state = QuantizedState(codes, torch.ones(1), "int8", (len(codes),), signed)
    return decode_state(state).to(device)
