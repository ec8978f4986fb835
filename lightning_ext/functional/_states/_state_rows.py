"""Optimizer states in a form whose rows stand by themselves, so that ranks may hold any of them.

Differs: blocks go over the ends of rows, and ranks begin new ones where their rows begin. So each
    row is given the scales of all blocks that it meets, and where its first entry lies in a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ext.functional._states._codes import decode_dynamic, decode_expanded, unpack
from lightning_ext.functional._states._formats import BITS, encode_state
from lightning_ext.functional._states._quantized_state import (
    QuantizedState,
    state_width,
    with_codes,
)


def state_to_rows(state: QuantizedState) -> dict[str, Tensor]:
    """Return a state of few bits with one code an entry and the scales of every row beside it.

    Args:
        state: in "int8", "int4" or "fp8", of n rows of C entries along dimension 0.

    Returns:
        ``codes``, uint8, in the state's shape, and

        - "int4" without a sign: ``row_scales`` of shape (n,), ``column_scales`` of shape (C,);
        - else ``scales`` of the blocks that a row meets, shape (n, k), for "fp8" (n, k, 2), and,
          unless C is a multiple of a block, ``offsets`` of the first entry of a row in its block,
          shape (n,), int16.

    Raises:
        ValueError: of a vector in "int4" without a sign, whose scales have rows of their own.

    Example:
        >>> from lightning_ext.functional import encode_state
        >>> rows = state_to_rows(encode_state(torch.ones(3, 200), "int8"))
        >>> rows["scales"].shape, rows["offsets"]
        (torch.Size([3, 2]), tensor([  0, 200, 144], dtype=torch.int16))
    """
    rows, columns = _matrix(state.shape)
    flat = unpack(state.codes)[: rows * columns] if state.format == "int4" else state.codes
    found = {"codes": flat.reshape(state.shape)}
    if state.format == "int4" and not state.signed:
        _refuse_vector(columns)
        parts = state.scales.split([rows, columns])
        return found | {"row_scales": parts[0], "column_scales": parts[1]}
    width = state_width(state.shape, state.format, state.signed)
    offsets, blocks, _ = _blocks(rows, columns, width, state.scales.device)
    empty = state.scales.new_zeros(*blocks.shape, *state.scales.shape[1:])
    count = len(state.scales)
    found["scales"] = state.scales[blocks.clamp_max(count - 1)] if count else empty
    if columns % width:
        found["offsets"] = offsets.to(torch.int16)
    return found


def state_from_rows(
    found: dict[str, Tensor], format: str, *, signed: bool = True
) -> QuantizedState:
    """Return the state that rows make, which may be some of those that ``state_to_rows`` returned.

    Where blocks begin as they did, codes and scales are the same, bit for bit. Else what they stand
    for is encoded again, with the error that the format has.

    Args:
        found: as ``state_to_rows`` returns it, or some rows of each but ``column_scales``.
        format: "int8", "int4" or "fp8".
        signed: whether entries may be negative.

    Example:
        >>> from lightning_ext.functional import decode_state, encode_state
        >>> rows = state_to_rows(encode_state(torch.arange(512.0).view(2, 256), "int8"))
        >>> lower = state_from_rows({name: x[1:] for name, x in rows.items()}, "int8")
        >>> decode_state(lower)[0, -1]
        tensor(507.5020)
    """
    codes = found["codes"]
    shape = tuple(codes.shape)
    rows, columns = _matrix(shape)
    if "row_scales" in found:
        scales = torch.cat([found["row_scales"], found["column_scales"]])
        return with_codes(codes, scales, format, signed)
    width = state_width(shape, format, signed)
    offsets, blocks, met = _blocks(rows, columns, width, codes.device)
    given = found.get("offsets", torch.zeros_like(offsets)).to(offsets.dtype)
    if not bool((given == offsets).all()):
        return encode_state(_numbers(found, given, format, signed, width), format, signed=signed)
    given_scales = found["scales"]
    scales = given_scales.new_zeros(-(-rows * columns // width), *given_scales.shape[2:])
    scales[blocks[met]] = given_scales[met]
    return with_codes(codes, scales, format, signed)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _refuse_vector(columns: int) -> None:
    if columns < 2:
        raise ValueError(
            'a vector in "int4" without a sign has no rows that stand by themselves; take "float32"'
        )


def _blocks(
    rows: int, columns: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets of rows in their first block, numbers of blocks, and which of these a row meets."""
    starts = torch.arange(rows, device=device) * columns
    most = columns // width if columns % width == 0 else (columns + width - 2) // width + 1
    blocks = (starts // width)[:, None] + torch.arange(most, device=device)
    return starts % width, blocks, blocks * width < (starts + columns)[:, None]


def _numbers(
    found: dict[str, Tensor], offsets: Tensor, format: str, signed: bool, width: int
) -> Tensor:
    """What codes stand for, each by the scale of its own block."""
    codes, scales = found["codes"], found["scales"]
    _, columns = _matrix(tuple(codes.shape))
    places = torch.arange(columns, device=codes.device)
    which = (offsets[:, None] + places) // width
    if format == "fp8":
        own = scales.gather(1, which[..., None].expand(-1, -1, 2))
        return decode_expanded(codes.reshape(-1, 1), own.view(-1, 2)).view(codes.shape)
    own = scales.gather(1, which).view(-1)
    return decode_dynamic(codes.reshape(-1, 1), own, BITS[format], signed).view(codes.shape)
