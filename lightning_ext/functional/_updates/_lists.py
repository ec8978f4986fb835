"""Updates of lists of parameters: one by one whatever they hold, or as many as a cache holds.

Differs: gradients are scaled and clipped on their way in; torch's fused optimizers write the scaled
    ones back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional._states._formats import QuantizedState, decode_state
from lightning_ext.functional._updates._adam_directions import by_spans, wide_dtype
from lightning_ext.functional._updates._cached import cached_lists
from lightning_ext.functional._updates._checks import Options, States, is_traced
from lightning_ext.functional._updates._row_parts import (
    Bits,
    is_at_hand,
    is_random,
    parts_of,
    write_state,
    write_weight,
)
from lightning_ext.functional._updates._split_weight import join_weight

Formula = Callable[..., tuple[Tensor | None, ...]]
Update = Callable[[slice, list[Tensor], list[Tensor], Tensor], Tensor]


def grad_factor(options: Options) -> Tensor | None:
    """Return what gradients are multiplied by, of no dimension; ``None`` for 1.

    Args:
        options: of the call.
    """
    factor = None if options.clip is None else options.clip.reshape(())
    if options.grad_scale is None:
        return factor
    inverse = options.grad_scale.reshape(()).reciprocal()
    return inverse if factor is None else factor * inverse


def scaled_lists(
    columns: Sequence[Sequence[Any]], options: Options, *, cached: bool = False
) -> Iterator[list[list[Any]]]:
    """Yield the lists, of which the second are gradients, multiplied by what the options ask for.

    Args:
        columns: parameters, gradients, states and steps; contiguous, of one dtype; unchanged.
        options: of the call.
        cached: yield as much at a time as a CPU's cache holds, also if nothing is multiplied.
    """
    factor = grad_factor(options)
    if factor is None and not cached:
        yield [list(column) for column in columns]
        return
    for params, grads, *others in cached_lists(columns):
        if factor is not None:
            grads = list(torch._foreach_mul(grads, factor.to(grads[0].dtype)))
        yield [params, grads, *others]


def is_skipped(options: Options) -> bool:
    """Return whether a step is left out, where no device has to be waited for to know it.

    Args:
        options: of the call.
    """
    found = options.found_inf
    return found is not None and is_known(found) and bool(found)


def is_known(number: Tensor) -> bool:
    """Return whether a number can be read without waiting for a device.

    Args:
        number: of one entry.
    """
    return number.is_cpu and not is_traced()


def _are_none(found_inf: Tensor | None) -> bool:
    """Whether it is known that no infinities were found."""
    return found_inf is not None and is_known(found_inf) and not found_inf


def update_one_by_one(
    formula: Formula,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[States],
    steps: Sequence[Tensor] | None,
    options: Options,
    *,
    in_torch: Formula | None = None,
) -> None:
    """Do a formula for every parameter in its wide dtype, in place, whatever the lists hold.

    Args:
        formula: of param, grad, states and step; returns the new param and states. Each entry
            goes by itself.
        params: parameters.
        grads: gradients.
        states: lists of states.
        steps: counts of steps, where the formula or random bits need them.
        options: of the call.
        in_torch: the same formula by torch's loops on a CPU, which take contiguous tensors and may
            change all but the gradient in place.
    """
    if _are_none(options.found_inf):
        options = options._replace(found_inf=None)
    errors = [None] * len(params) if options.weight_errors is None else options.weight_errors
    for i, row in enumerate(zip(params, errors, grads, *states, strict=True)):
        bits = Bits(options, None if steps is None else steps[i], i)
        at_hand = options.found_inf is None and is_at_hand(row)
        chosen = partial(_contiguous, in_torch) if at_hand and in_torch is not None else formula
        for part in parts_of(row, bits) if at_hand else (row,):
            _update_part(chosen, part, bits)


def _contiguous(update: Formula, *row: Tensor | None) -> tuple[Tensor | None, ...]:
    return update(*(None if x is None else x.contiguous() for x in row))


def _update_part(formula: Formula, part: Sequence[Any], bits: Bits) -> None:
    param, error, grad, *states = part
    found_inf, factor = bits.options.found_inf, grad_factor(bits.options)
    held = [param if error is None else join_weight(param, error), *map(decode_state, states)]
    dtype = wide_dtype(grad, *held)
    old = [x.to(dtype) for x in held]
    scaled = grad.to(dtype) if factor is None else grad.to(dtype) * factor
    step = None if bits.step is None else bits.step.reshape(())
    new = _unless(found_inf, old, formula(old[0], scaled, *old[1:], step))
    write_weight(param, error, new[0], bits)
    for k, (state, value) in enumerate(zip(states, new[1:], strict=True)):
        with _codes_unless(found_inf, state):
            write_state(state, value, bits, 1 + k)


def update_by_spans(
    update: Update,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Any]],
    steps: Sequence[Tensor] | None,
    options: Options,
    *,
    whole: bool,
    left_out: float,
    alone: int | None = None,
    span: int | None = None,
) -> Tensor:
    """Run an update, which needs norms, over parts of a list; return what it returns, of all.

    Args:
        update: takes a part of the list, its weights, which it changes, its gradients as the
            options have them, and memory to work in.
        params: parameters.
        grads: gradients.
        states: lists of what else it changes: tensors, tuples of them, states in few bits.
        steps: counts of steps, where random bits need them.
        options: of the call.
        whole: all at once.
        left_out: what is returned of each parameter where ``found_inf`` leaves the step out.
        alone: entries of a parameter that is a part of its own.
        span: entries of a part, on a CPU.
    """
    if not params:
        return torch.zeros(0)
    if is_skipped(options):
        dtype = wide_dtype(*params)
        return torch.full((len(params),), left_out, dtype=dtype, device=params[0].device)
    run = partial(_update_span, update, params, grads, steps, options)
    wide = torch.float32 if _is_split(params[0], options) else None
    if options.found_inf is None or is_known(options.found_inf):
        return by_spans(run, params, whole=whole, alone=alone, span=span, dtype=wide)
    written = [*_tensors([params, *states]), *(options.weight_errors or ())]
    old = [x.clone() for x in written]
    found = by_spans(run, params, whole=whole, alone=alone, span=span, dtype=wide)
    skipped = options.found_inf.reshape(()).to(found.device) != 0
    for x, y in zip(written, old, strict=True):
        x.copy_(torch.where(skipped, y, x))
    return torch.where(skipped, left_out, found)


def _update_span(
    update: Update,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[Tensor] | None,
    options: Options,
    part: slice,
    scratch: Tensor,
) -> Tensor:
    first, factor = part.start or 0, grad_factor(options)
    weights, scaled = _opened(params[part], options, first), list(grads[part])
    if factor is not None:
        wide = [x.to(wide_dtype(x)) for x in scaled]
        scaled = list(torch._foreach_mul(wide, factor.to(wide[0].device)))
    found = update(part, weights, scaled, scratch)
    if options.rounding == "nearest" and options.weight_errors is None:
        return found
    for i, (param, weight) in enumerate(zip(params[part], weights, strict=True), first):
        if weight is not param:
            error = None if options.weight_errors is None else options.weight_errors[i]
            bits = Bits(options, None if steps is None else steps[i], i)
            write_weight(param, error, weight, bits)
    return found


def _is_split(param: Tensor, options: Options) -> bool:
    """Whether a weight is not rounded to nearest."""
    return is_random(param, options) or options.weight_errors is not None


def _opened(params: Sequence[Tensor], options: Options, first: int) -> list[Tensor]:
    """Weights as an update changes them: themselves, or copies that keep small steps."""
    if options.weight_errors is not None:
        errors = options.weight_errors[first : first + len(params)]
        return [join_weight(*pair) for pair in zip(params, errors, strict=True)]
    if options.rounding == "nearest":
        return list(params)
    return [x.float() if _is_split(x, options) else x for x in params]


def _tensors(lists: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
    for x in chain.from_iterable(lists):
        if isinstance(x, QuantizedState):
            yield from (x.codes, x.scales)
        else:
            yield from (x,) if isinstance(x, Tensor) else x


def _unless(
    found_inf: Tensor | None, old: Sequence[Tensor], new: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """What is new, of states that there are; what is old where infinities were found."""
    kept = [x for x in new if x is not None]
    if found_inf is None:
        return kept
    skipped = found_inf.reshape(()).to(old[0].device) != 0
    return [torch.where(skipped, x, y) for x, y in zip(old, kept, strict=True)]


@contextmanager
def _codes_unless(found_inf: Tensor | None, state: Any) -> Iterator[None]:
    """Put codes and scales back where infinities were found: a number has not always one code."""
    if found_inf is None or not isinstance(state, QuantizedState):
        yield
        return
    written = (state.codes, state.scales)
    old = [x.clone() for x in written]
    yield
    skipped = found_inf.reshape(()).to(state.codes.device) != 0
    for x, y in zip(written, old, strict=True):
        x.copy_(torch.where(skipped, y, x))
