"""States as columns of a launch, and what their formats are read by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_ext.functional import QuantizedState
from lightning_ext.functional._states._code_books import code_book, e4m3_logarithm_table
from lightning_ext.functional._states._quantized_state import check_state, state_width
from lightning_ext.kernels._triton._kept import kept, moved, on_device

State = Tensor | QuantizedState
Columns = list[list[Tensor]]

_BOOKS = ((8, True), (8, False), (4, True))
_NAMES = {
    ("int8", True): "int8_signed",
    ("int8", False): "int8_unsigned",
    ("int4", True): "int4_signed",
    ("int4", False): "int4_rank1",
}


def state_format(state: State) -> str:
    """Return the name of a state's format in a kernel; one launch is for states of one name."""
    if isinstance(state, Tensor) or state.format == "float32":
        return "tensor"
    return _NAMES.get((state.format, state.signed), state.format)


@contextmanager
def state_columns(states: Sequence[State], *, written: bool = True) -> Iterator[Columns]:
    """Give the columns of states of one format: codes, scales, widths, scales to be written.

    Plain tensors and "bfloat16" have the first one alone, and only "int4_rank1" has the last two:
    its new scales are zeros that a launch before the writing one fills with maxima, and that take
    the place of the old ones at the end. What is not contiguous is copied there and back.

    Args:
        states: plain tensors or states, at least one.
        written: whether the launch changes them.

    Raises:
        TypeError: if codes or scales of a state have another dtype than its format.
        ValueError: if they do not belong to each other.
    """
    name = state_format(states[0])
    quantized = [x for x in states if isinstance(x, QuantizedState)]
    for x in quantized:
        check_state(x)
    own = [[x if isinstance(x, Tensor) else x.codes for x in states]]
    if name not in ("tensor", "bfloat16"):
        own.append([x.scales for x in quantized])
    ready = [[x.contiguous() for x in column] for column in own]
    results = ready
    if name == "int4_rank1":
        results = [ready[0], _zeros_like(ready[1])]
        ready = [*ready, [_width(x.codes.device, rank_one_width(x)) for x in quantized], results[1]]
    yield ready
    if not written:
        return
    for column in own:
        torch.autograd.graph.increment_version([x for x in column if not x.is_inference()])
    for column, made in zip(own, results, strict=True):
        pairs = [(x, y) for x, y in zip(column, made, strict=True) if x is not y]
        if pairs:
            torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])


def rank_one_width(state: QuantizedState) -> int:
    """Return the length of a row of the matrix that an "int4_rank1" state is taken for."""
    return state_width(state.shape, state.format, state.signed)


@kept
def code_books(device: torch.device) -> Tensor:
    """Return all books on a device as bytes; ``_state_formats`` knows where they stand."""
    books = [code_book(*book, torch.device("cpu")) for book in _BOOKS]
    firsts = torch.cat([book.firsts for book in books]).to(torch.uint8)
    halves = [torch.nn.functional.pad(x, (0, 256 - len(x))) for b in books for x in b[:2]]
    numbers = torch.cat([*halves, e4m3_logarithm_table(torch.device("cpu"))])
    return moved(torch.cat([firsts, numbers.view(torch.uint8)]), device)


@kept
def _width(device: torch.device, width: int) -> Tensor:
    """The length of a row as a tensor on the device, kept there."""
    return on_device([width], torch.int64, device)


def _zeros_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of these sizes, made at once; each begins at a multiple of 16 bytes."""
    sizes = [x.numel() for x in tensors]
    whole = tensors[0].new_zeros(sum(size + -size % 4 for size in sizes))
    parts = whole.split([size + -size % 4 for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
