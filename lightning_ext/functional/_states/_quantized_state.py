"""A moment of an optimizer in one of the formats: what it is made of, and what checkpoints keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ext.functional._plain import check_plain
from lightning_ext.functional._states._codes import pack, unpack

STATE_FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")
_BLOCKS = {"int8": 256, "int4": 128, "fp8": 128}
_WIDE = (torch.float32, torch.float64)
_CODE_DTYPES = {"float32": _WIDE, "bfloat16": (torch.bfloat16, torch.float64)}
_ZEROS = {("int8", True): 127, ("int4", True): 0x77}  # the byte of zeros, where it is not 0


class QuantizedState(NamedTuple):
    """A moment of an optimizer in one of the formats.

    Attributes:
        codes: the tensor itself in float32 or bfloat16; else uint8, of the tensor's shape, under
            "int4" two codes a byte, shape (⌈n/2⌉,). Entries are in row-major order.
        scales: at least float32, of

            - "float32", "bfloat16": none;
            - "int8", and "int4" with a sign: max |x| of blocks of 256 and 128, shape (blocks,);
            - "int4" without a sign: the maxima of the rows of the matrix (rows, rest), then of
              its columns;
            - "fp8": max |x| and the power of groups of 128, shape (groups, 2).

        format: its name.
        shape: of the tensor.
        signed: whether entries may be negative: a first moment, not a second one.
        reduce: where the tensor is some rows of a matrix, as ranks have them, and "int4" without a
            sign: takes the maxima of this rank's columns and returns those over all rows. ``None``
            where all rows are here.
    """

    codes: Tensor
    scales: Tensor
    format: str
    shape: tuple[int, ...]
    signed: bool
    reduce: Callable[[Tensor], Tensor] | None = None


def zero_state(
    shape: Sequence[int],
    format: str,
    *,
    signed: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> QuantizedState:
    """Return the state of a tensor of zeros, that of an optimizer before its first step.

    Args:
        shape: of the tensor.
        format: "float32", "bfloat16", "int8", "int4" or "fp8".
        signed: whether entries may be negative.
        device: where it is; torch's default where None.
        dtype: of its scales, and of the codes of "float32".

    Raises:
        ValueError: if there is no such format.

    Example:
        >>> state_bytes(zero_state((64, 64), "int4")), state_bytes(zero_state((64, 64), "int8"))
        (2176, 4160)
    """
    check_format(format)
    shape = tuple(shape)
    codes_shape, scales_shape = state_layout(shape, format, signed)
    if format in ("float32", "bfloat16"):
        kept = dtype if format == "float32" else torch.bfloat16
        codes = torch.zeros(shape, dtype=kept, device=device)
        return QuantizedState(codes, codes.new_zeros(0, dtype=dtype), format, shape, signed)
    codes = torch.full(
        codes_shape, _ZEROS.get((format, signed), 0), dtype=torch.uint8, device=device
    )
    if (format, signed) == ("int4", True) and math.prod(shape) % 2:
        codes[-1] = 7  # there is no entry in the high bits
    scales = torch.zeros(scales_shape, dtype=dtype, device=device)
    if format == "fp8":
        scales[:, 1] = 1.0
    return QuantizedState(codes, scales, format, shape, signed)


def state_bytes(state: QuantizedState | Tensor) -> int:
    """Return how many bytes a state's codes and scales take, or a plain tensor's entries.

    Example:
        >>> state_bytes(zero_state((256,), "fp8")), state_bytes(torch.zeros(256))
        (272, 1024)
    """
    if isinstance(state, Tensor):
        return state.nbytes
    return state.codes.nbytes + state.scales.nbytes


def scale_state_(state: QuantizedState | Tensor, factor: float) -> None:
    """Multiply what a state stands for, in place; codes of few bits stay as they are.

    Args:
        state: a state, or a tensor.
        factor: above 0.

    Raises:
        ValueError: if the factor is not above 0.

    Example:
        >>> from lightning_ext.functional import decode_state, encode_state
        >>> state = encode_state(torch.tensor([0.5, 1.0]), "fp8")
        >>> scale_state_(state, 2.0)
        >>> decode_state(state)
        tensor([1.0000, 2.0000])
    """
    if not factor > 0:
        raise ValueError(f"factor={factor} is not allowed; it must be above 0")
    if isinstance(state, Tensor):
        state.mul_(factor)
    elif state.format in ("float32", "bfloat16"):
        state.codes.mul_(factor)
    elif state.format == "fp8":
        state.scales[:, 0].mul_(factor)
    else:
        state.scales.mul_(factor)


def export_state(state: QuantizedState) -> dict[str, Any]:
    """Return a state in the form that checkpoints keep, one code an entry.

    Args:
        state: as ``encode_state`` returns it.

    Returns:
        ``codes``, in the state's shape, uint8 where they are codes; ``scales``; ``format``;
        ``signed``. The tensors may share memory with the state.

    Example:
        >>> export_state(zero_state((3,), "int4"))["codes"]
        tensor([7, 7, 7], dtype=torch.uint8)
    """
    codes = state.codes
    if state.format == "int4":
        codes = unpack(codes)[: math.prod(state.shape)].view(state.shape)
    return {"codes": codes, "scales": state.scales, "format": state.format, "signed": state.signed}


def import_state(saved: dict[str, Any]) -> QuantizedState:
    """Return the state that ``export_state`` was given, bit for bit.

    Args:
        saved: what it returned.

    Raises:
        ValueError: if codes and scales do not belong to each other.
        TypeError: if they have another dtype.
    """
    return with_codes(*(saved[name] for name in ("codes", "scales", "format", "signed")))


def with_codes(codes: Tensor, scales: Tensor, format: str, signed: bool) -> QuantizedState:
    """Return the state of codes in the tensor's shape, one an entry.

    Args:
        codes: as ``export_state`` returns them.
        scales: as the state has them.
        format: of the state.
        signed: of the state.

    Raises:
        ValueError: if codes and scales do not belong to each other.
        TypeError: if they have another dtype.
    """
    packed = pack(codes) if format == "int4" else codes
    state = QuantizedState(packed, scales, format, tuple(codes.shape), signed)
    check_state(state)
    return state


def state_layout(
    shape: Sequence[int], format: str, signed: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of codes and scales."""
    count, width = math.prod(shape), state_width(shape, format, signed)
    blocks = -(-count // width)
    if format in ("float32", "bfloat16"):
        return tuple(shape), (0,)
    if format == "fp8":
        return tuple(shape), (blocks, 2)
    is_matrix = math.prod(shape[1:]) > 1  # which has columns also where a rank has none of its rows
    columns = width if format == "int4" and not signed and (count or is_matrix) else 0
    codes = (-(-count // 2),) if format == "int4" else tuple(shape)
    return codes, (blocks + columns,)


def state_width(shape: Sequence[int], format: str, signed: bool) -> int:
    """Return how many consecutive entries share a scale: of a block, or of a matrix's row."""
    if format != "int4" or signed:
        return _BLOCKS.get(format, 1)
    rest = math.prod(shape[1:])
    if rest > 1:
        return rest
    return max(min(math.prod(shape), _BLOCKS[format]), 1)


def has_parts(state: QuantizedState | Tensor) -> bool:
    """Return whether entries are written alike whichever others are: no sums, no random bits.

    Args:
        state: a state, or a tensor.
    """
    if isinstance(state, Tensor):
        return True
    return state.format != "bfloat16" and (state.format != "int4" or state.signed)


def state_part(state: QuantizedState, start: int, size: int) -> QuantizedState:
    """Return some entries of a state that has parts, in its memory.

    Args:
        state: contiguous.
        start: the first of them, a multiple of 256.
        size: how many at most, a multiple of 256 as well.
    """
    width = state_width(state.shape, state.format, state.signed)
    each = 2 if state.format == "int4" else 1
    codes = state.codes.view(-1)[start // each : (start + size) // each]
    scales = state.scales[start // width : (start + size) // width]
    shape = (min(size, math.prod(state.shape) - start),)
    return state._replace(codes=codes, scales=scales, shape=shape)


def check_state(state: QuantizedState) -> None:
    """Refuse a state whose parts do not belong to each other; a kernel would not notice.

    Args:
        state: made by the caller.

    Raises:
        TypeError: if codes or scales have another dtype than the format, or are DTensors.
        ValueError: if there is no such format, or they have another shape, or two devices.
    """
    check_format(state.format)
    check_plain(codes=state.codes, scales=state.scales)
    if state.codes.device != state.scales.device:
        raise ValueError(
            f"codes are on {state.codes.device}, scales on {state.scales.device}; they must be on "
            "one device"
        )
    codes, scales = state_layout(state.shape, state.format, state.signed)
    if (state.codes.shape, state.scales.shape) != (codes, scales):
        raise ValueError(
            f"codes of shape {tuple(state.codes.shape)} with scales of {tuple(state.scales.shape)} "
            f"are no {state.format} state of a tensor of shape {tuple(state.shape)}, which has "
            f"{codes} and {scales}"
        )
    dtypes = _CODE_DTYPES.get(state.format, (torch.uint8,))
    if state.codes.dtype not in dtypes or state.scales.dtype not in _WIDE:
        raise TypeError(
            f"codes in {state.codes.dtype} with scales in {state.scales.dtype} are no "
            f"{state.format} state, which has {dtypes[0]} and torch.float32"
        )


def check_format(format: str) -> None:
    """Refuse the name of a format that does not exist.

    Args:
        format: the name.

    Raises:
        ValueError: if there is no such format.
    """
    if format not in STATE_FORMATS:
        raise ValueError(f"format={format!r} is not allowed; choose one of {STATE_FORMATS}")
