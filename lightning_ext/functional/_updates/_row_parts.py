"""What belongs to one parameter, read and written in parts that a CPU's cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext.functional._quantization._round_stochastic import round_stochastic
from lightning_ext.functional._states._formats import QuantizedState, decode_state, encode_state
from lightning_ext.functional._states._quantized_state import has_parts, state_part
from lightning_ext.functional._updates._adam_directions import STREAMS
from lightning_ext.functional._updates._cached import part_of
from lightning_ext.functional._updates._checks import Options, is_traced
from lightning_ext.functional._updates._split_weight import split_weight

_PART = 2**16  # entries of a core's cache, a multiple of every block of states


class Bits(NamedTuple):
    """Where the random bits of a parameter begin."""

    options: Options
    step: Tensor | None
    place: int

    def of(self, which: int) -> dict[str, Any]:
        """Seed, step and stream of its weight, 0, or of a state."""
        step = 0 if self.step is None else self.step.reshape(())
        stream = self.options.stream + STREAMS * self.place + which
        return {"seed": self.options.seed, "step": step, "stream": stream}


def is_at_hand(row: Sequence[Any]) -> bool:
    """Return whether a row is made of plain tensors on the CPU, and none is traced.

    Args:
        row: tensors, states and ``None``.
    """
    tensors = _tensors(row)
    return not is_traced() and all(type(x) in (Tensor, Parameter) and x.is_cpu for x in tensors)


def parts_of(row: Sequence[Any], bits: Bits) -> Iterator[Sequence[Any]]:
    """Yield a row that is at hand in parts; what these change stands in the row afterwards.

    Args:
        row: a weight, its error, its gradient and its states.
        bits: that weights and states are rounded by.
    """
    size, most = row[0].numel(), _PART * torch.get_num_threads()
    if size <= most or not all(x.is_contiguous() for x in _tensors(row)):
        yield row
        return
    param, error, grad, *states = row
    weight = param.float() if error is None and is_random(param, bits.options) else param
    opened = [x if has_parts(x) else decode_state(x) for x in states]
    for start in range(0, size, most):
        yield [_part(x, start, most) for x in (weight, error, grad, *opened)]
    if weight is not param:
        write_weight(param, None, weight, bits)
    for k, (state, value) in enumerate(zip(states, opened, strict=True)):
        if value is not state:
            write_state(state, value, bits, 1 + k)


def is_random(param: Tensor, options: Options) -> bool:
    """Return whether a weight that has no error is rounded at random.

    Args:
        param: the weight.
        options: of the call.
    """
    return options.rounding == "stochastic" and param.dtype == torch.bfloat16


def write_state(state: Tensor | QuantizedState, value: Tensor, bits: Bits, which: int) -> None:
    """Write numbers to a state.

    Args:
        state: of a parameter.
        value: of the state's shape.
        bits: of the parameter.
        which: of its streams.
    """
    if isinstance(state, Tensor):
        state.copy_(value)
        return
    chosen = bits.of(which) if state.format == "bfloat16" else {}
    encode_state(value, state.format, signed=state.signed, out=state, **chosen)


def write_weight(param: Tensor, error: Tensor | None, value: Tensor, bits: Bits) -> None:
    """Write numbers to a weight and its error, as the options want them rounded.

    Args:
        param: the weight.
        error: what ``split_weight`` returns besides, if there is one.
        value: of the weight's shape.
        bits: of the parameter.
    """
    if error is not None:
        rounded, left = split_weight(value)
        param.copy_(rounded)
        error.copy_(left)
    elif is_random(param, bits.options):
        param.copy_(round_stochastic(value, **bits.of(0)))
    else:
        param.copy_(value)


def _tensors(row: Sequence[Any]) -> list[Tensor]:
    pairs = (x[:2] if isinstance(x, QuantizedState) else (x,) for x in row)
    return [x for pair in pairs for x in pair if x is not None]


def _part(x: Any, start: int, size: int) -> Any:
    if isinstance(x, QuantizedState):
        return state_part(x, start, size)
    return None if x is None else part_of(x, start, size)
