"""Optimizer states in fewer bits.

Source: Zamirai et al. 2020 (arXiv:2010.06192), "bfloat16" rounded at random; Dettmers et al. 2022
    (arXiv:2110.02861), "int8"; Li et al. 2023 ("Memory Efficient Optimizers with 4-bit States",
    arXiv:2309.01507), "int4"; Xi et al. 2025 (COAT, arXiv:2410.19313), "fp8".
Differs: rank-1 scales are those of the matrix (rows, rest) whatever the number of dimensions, and
    of rows of 128 entries where there is one column or none. Of COAT's three numbers a group two
    are kept: its centre cancels out. Zeros, which have a code of their own, do not widen a group's
    range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain
from lightning_ext.functional._quantization._round_stochastic import round_stochastic
from lightning_ext.functional._states._codes import (
    as_rows,
    decode_dynamic,
    decode_expanded,
    decode_rank_one,
    encode_dynamic,
    encode_expanded,
    encode_rank_one,
    pack,
    rank_one_scales,
    spans,
    unpack,
)
from lightning_ext.functional._states._quantized_state import (
    QuantizedState,
    check_format,
    check_state,
    state_width,
    zero_state,
)
from lightning_ext.functional._widen import widen

BITS = {"int8": 8, "int4": 4}


def encode_state(
    x: Tensor,
    format: str,
    *,
    signed: bool = True,
    seed: int = 0,
    step: int | Tensor = 0,
    stream: int = 0,
    out: QuantizedState | None = None,
) -> QuantizedState:
    """Return a tensor in a format; s is the scale, c the code of an entry.

        "bfloat16"            rounded at random, so that the mean is x
        "int8"                c = argmin |x/s − map_c|,  s = max |x| of 256 entries
        "int4" with a sign    the same with 16 codes,  s = max |x| of 128 entries
        "int4" without        c = argmin |x/s − (c + 1)/16|,  s = min(row's max, column's max)
        "fp8"                 c = E4M3(sign(x)·448·(|x|/s)^k),  s = max |x| of 128 entries

    with the dynamic map of ``_code_books``, and k the largest multiple of 1/8 in [1/8, 16] that
    stretches the group's range, max |x|/min |x| > 0, to no more than 448²/2. Ties go to the lower
    code, in "fp8" away from 0. A scale below 2⁻¹²⁶ is 0. Without a sign, what is above 0 is never 0
    in "int8" and "int4": a step is divided by its root. What shares its scale with a number that is
    not finite is not finite when read.

    Args:
        x: real, any shape.
        format: "float32", "bfloat16", "int8", "int4" or "fp8".
        signed: whether entries may be negative. ``False`` asks for entries of at least 0: "int8"
            and "int4" have no code for others, which become the least number they have; the other
            formats keep signs all the same.
        seed: of the bits that "bfloat16" is rounded by; see ``random_bits``.
        step: 32 bits; a tensor as in ``random_bits``.
        stream: 32 bits, another one for each tensor.
        out: a state of the same shape, format and sign to write to.

    Returns:
        The state, without a gradient: ``out`` if there is one.

    Raises:
        TypeError: if x is not real floating point, or is a DTensor.
        ValueError: if there is no such format, or ``out`` is of another shape, format or sign, or
            on another device.

    Example:
        >>> state = encode_state(torch.tensor([0.5, -1.0, 0.0]), "int8")
        >>> state.codes, decode_state(state)
        (tensor([219,   0, 127], dtype=torch.uint8), tensor([ 0.5008, -0.9930,  0.0000]))
    """
    check_state_input(x, format, signed, out)
    x = widen(x.detach())
    if out is None:
        out = zero_state(x.shape, format, signed=signed, device=x.device, dtype=x.dtype)
    if format == "bfloat16":
        rounded = round_stochastic(x, seed=seed, step=step, stream=stream)
        out.codes.copy_(rounded)
    elif format == "float32":
        out.codes.copy_(x)
    elif x.numel() or out.reduce is not None:
        _encode(x.contiguous().view(-1), out)
    return out


def decode_state(state: QuantizedState | Tensor) -> Tensor:
    """Return what a state stands for; a tensor stands for itself.

        "int8", "int4" with a sign    s·map_c
        "int4" without                s·(c + 1)/16: never 0 where s is not
        "fp8"                         sign(c)·s·(|E4M3(c)|/448)^(1/k)

    Args:
        state: as ``encode_state`` returns it, or a tensor.

    Returns:
        The state's shape, in the dtype of its scales, with a gradient by them; in float32 where it
        has none.

    Raises:
        TypeError: if codes or scales have another dtype than the format.
        ValueError: if they do not belong to each other.
    """
    if isinstance(state, Tensor):
        return state
    check_state(state)
    if state.format in ("float32", "bfloat16"):
        return widen(state.codes)
    count, width = math.prod(state.shape), state_width(state.shape, state.format, state.signed)
    if not count:
        return state.scales.new_zeros(state.shape)
    parts = []
    rows = -(-count // width)
    for span in spans(rows, width):
        start, stop = span.start * width, min(span.stop * width, count)
        codes = _codes_of(state, start, stop)
        parts.append(_decode(as_rows(codes, width), state, span, rows).view(-1)[: stop - start])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(state.shape)


def check_state_input(x: Tensor, format: str, signed: bool, out: QuantizedState | None) -> None:
    """Refuse what ``encode_state`` does not take.

    Args:
        x: to be encoded.
        format: of the state.
        signed: of the state.
        out: where it goes.

    Raises:
        TypeError: if x is not real floating point.
        ValueError: if there is no such format, or ``out`` is of another shape, format or sign.
    """
    check_format(format)
    check_plain(x=x)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; a state is made of real floating point numbers")
    if out is None:
        return
    check_state(out)
    if (out.format, tuple(out.shape), out.signed) != (format, tuple(x.shape), signed):
        raise ValueError(
            f"out is {out.format} of shape {tuple(out.shape)} with signed={out.signed}; wanted "
            f"{format} of shape {tuple(x.shape)} with signed={signed}"
        )
    if out.codes.device != x.device:
        raise ValueError(
            f"out is on {out.codes.device}, x on {x.device}; they must be on one device"
        )


def _encode(flat: Tensor, out: QuantizedState) -> None:
    """Write codes and scales, part by part."""
    count, width = flat.numel(), state_width(out.shape, out.format, out.signed)
    whole = as_rows(flat, width)
    rank_one = out.format == "int4" and not out.signed
    if rank_one:
        maxima = rank_one_scales(whole)
        if out.reduce is not None:
            maxima = maxima[0], out.reduce(maxima[1])
        out.scales.copy_(torch.cat(maxima))
    for span in spans(*whole.shape):
        start, stop = span.start * width, min(span.stop * width, count)
        if rank_one:
            codes = encode_rank_one(whole[span], maxima[0][span], maxima[1])
        else:
            codes, out.scales[span] = (
                encode_expanded(whole[span])
                if out.format == "fp8"
                else encode_dynamic(whole[span], BITS[out.format], out.signed)
            )
        _write_codes(out, start, stop, codes.view(-1)[: stop - start])


def _write_codes(out: QuantizedState, start: int, stop: int, codes: Tensor) -> None:
    if out.format == "int4":
        out.codes[start // 2 : -(-stop // 2)] = pack(codes)
    else:
        out.codes.view(-1)[start:stop] = codes


def _codes_of(state: QuantizedState, start: int, stop: int) -> Tensor:
    if state.format == "int4":
        return unpack(state.codes[start // 2 : -(-stop // 2)])[: stop - start]
    return state.codes.reshape(-1)[start:stop]


def _decode(codes: Tensor, state: QuantizedState, span: slice, rows: int) -> Tensor:
    if state.format == "fp8":
        return decode_expanded(codes, state.scales[span])
    if state.format == "int4" and not state.signed:
        return decode_rank_one(codes, state.scales[:rows][span], state.scales[rows:])
    return decode_dynamic(codes, state.scales[span], BITS[state.format], state.signed)
