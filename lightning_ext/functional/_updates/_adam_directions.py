"""The step of Adam before its rate, for updates that do more with it, and what they share.

Source: Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1.
Differs: the direction is that of moments in the dtype of their tensors, or before they are rounded
    to few bits, which may leave little of a second moment; on a CPU it is taken, several times
    faster, from torch's fused AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext.functional._states._formats import QuantizedState, decode_state, encode_state
from lightning_ext.functional._widen import widen

_SPAN = 2**19  # entries of parameters with which a CPU's cache is full
STREAMS = 4  # of random bits that each parameter has: its weight's, three states'
_LONG = 2**13  # entries of which torch's norm on a CPU adds up too many one after another

Tensors = Sequence[Tensor]
States = Sequence[Tensor | QuantizedState]


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | float,
    *,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool = True,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return m and v after a step, in their dtypes, and m̂/(√v̂ + ε), at least in float32."""
    dtype = wide_dtype(grad, exp_avg, exp_avg_sq)
    grad = grad.to(dtype)
    mean = exp_avg.to(dtype).lerp(grad, 1 - betas[0]).to(exp_avg.dtype)
    square = exp_avg_sq.to(dtype) * betas[1] + grad.square() * (1 - betas[1])
    square = square.to(exp_avg_sq.dtype)
    numerator, second = mean.to(dtype), square.to(dtype)
    if nesterov:
        numerator = numerator.lerp(grad, 1 - betas[0])
    if bias_correction:
        numerator = numerator / complement(betas[0], step, numerator)
        second = second / complement(betas[1], step, second)
    return mean, square, numerator / (second.sqrt() + eps)


def adam_directions_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Tensors,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    nesterov: bool = False,
    maximize: bool = False,
    seed: int = 0,
    stream: int = 0,
    scratch: Tensor | None = None,
    in_torch: bool | None = None,
) -> list[Tensor]:
    """Move the moments in place and return m̂/(√v̂ + ε) + λx, in ``scratch`` where it is of use.

    ``in_torch`` is what ``runs_fused`` returns of all lists, where that is known.
    """
    if in_torch is None:
        in_torch = not nesterov and runs_fused([*params, *grads, *exp_avgs, *exp_avg_sqs])
    if in_torch and not nesterov:
        directions, decay = _copies(params, scratch, weight_decay)
        torch._fused_adamw_(
            directions,
            list(grads),
            cast(list[Tensor], list(exp_avgs)),
            cast(list[Tensor], list(exp_avg_sqs)),
            [],
            counted(steps, bias_correction=bias_correction),
            lr=-1.0,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
        )
        return directions
    means, squares = ([decoded(x) for x in state] for state in (exp_avgs, exp_avg_sqs))
    dtype = wide_dtype(*params, *grads, *means, *squares)
    grads, means, squares = ([x.to(dtype) for x in column] for column in (grads, means, squares))
    if maximize:
        grads = torch._foreach_neg(grads)
    torch._foreach_lerp_(means, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    means = _rounded_later(exp_avgs, means, kept(exp_avgs, means, steps, seed, stream + 1))
    squares = _rounded_later(
        exp_avg_sqs, squares, kept(exp_avg_sqs, squares, steps, seed, stream + 2)
    )
    if nesterov:
        means = list(torch._foreach_lerp(means, grads, 1 - betas[0]))
    if bias_correction:
        pairs = list(zip(means, steps, strict=True))
        first, second = ([complement(beta, t, x) for x, t in pairs] for beta in betas)
        means = list(torch._foreach_div(means, first))
        squares = list(torch._foreach_div(squares, second))
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    found = list(torch._foreach_div(means, roots))
    if weight_decay:
        torch._foreach_add_(found, list(params), alpha=weight_decay)
    return found


def counted(steps: Tensors, *, bias_correction: bool) -> list[Tensor]:
    """Return the counts that torch's fused optimizers correct biases by; infinite ones do not."""
    return list(steps) if bias_correction else [torch.full((), math.inf)] * len(steps)


def decoded(state: Tensor | QuantizedState) -> Tensor:
    """Return a state's numbers, in memory of their own unless it is a tensor."""
    if isinstance(state, Tensor):
        return state
    found = decode_state(state)
    return found.clone() if state.format == "float32" else found


def kept(
    states: States, values: Tensors, steps: Tensors | None, seed: int, stream: int
) -> list[Tensor]:
    """Write values to states and return, in the values' dtype, what these keep of them.

    Args:
        states: tensors, perhaps the values themselves, or ``QuantizedState``.
        values: one for each.
        steps: what the random bits go by.
        seed: of the bits that "bfloat16" is rounded by.
        stream: of the first one's bits; each parameter has ``STREAMS``.
    """
    found = []
    for i, (state, value) in enumerate(zip(states, values, strict=True)):
        if state is value:
            found.append(value)
        elif isinstance(state, Tensor):
            found.append(state.copy_(value).to(value.dtype))
        else:
            bits: dict[str, Any] = {}
            if state.format == "bfloat16":
                step = 0 if steps is None else steps[i].reshape(())
                bits = {"seed": seed, "step": step, "stream": stream + STREAMS * i}
            encode_state(value, state.format, signed=state.signed, out=state, **bits)
            found.append(decode_state(state).to(value.dtype))
    return found


def _rounded_later(states: States, values: Tensors, stored: Tensors) -> list[Tensor]:
    """What tensors keep of values, and the values where states have few bits."""
    rows = zip(states, values, stored, strict=True)
    return [x if isinstance(state, QuantizedState) else y for state, x, y in rows]


def complement(beta: float, step: Tensor | float, like: Tensor) -> Tensor:
    """Return 1 − βᵗ of no dimension, without the loss of digits where it is small."""
    step = torch.as_tensor(step, dtype=torch.float64, device=like.device)
    power = -torch.expm1(step * math.log(beta)) if beta > 0 else torch.ones_like(step)
    return power.to(like.dtype)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which an update of these is computed, at least float32."""
    dtype = torch.float32
    for found in {x.dtype for x in tensors}:
        dtype = torch.promote_types(dtype, found)
    return dtype


def by_spans(
    update: Callable[[slice, Tensor], Tensor],
    params: Tensors,
    *,
    whole: bool = False,
    alone: int | None = None,
    span: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run an update over parts of a list and return what it returns, of all of them.

    Args:
        update: takes a part of the list and memory to work in.
        params: what is updated.
        whole: all at once, else as much as a CPU keeps in its cache: fresh memory costs more than
            the arithmetic.
        alone: entries of a parameter that is a part of its own.
        span: entries of a part.
        dtype: of that memory, the first parameter's by default.
    """
    if not params:
        return torch.zeros(0)
    sizes = [x.numel() for x in params]
    spans = [slice(None)]
    if not whole and params[0].device.type == "cpu":
        spans = _spans(sizes, span or _SPAN, alone)
    largest = max(sum(sizes[part]) for part in spans)
    scratch = params[0].new_empty(largest, dtype=dtype or params[0].dtype)
    found = [update(part, scratch) for part in spans]
    return found[0] if len(found) == 1 else torch.cat(found)


def carved(like: Tensors, scratch: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return tensors of these shapes, out of one piece of memory."""
    sizes = [x.numel() for x in like]
    if scratch is None:
        scratch = like[0].new_empty(sum(sizes), dtype=dtype)
    parts = scratch[: sum(sizes)].split(sizes)
    return [part.view_as(x) for part, x in zip(parts, like, strict=True)]


def foreach_sq_norms(tensors: Tensors) -> Tensor:
    """Return Σ x² of each tensor, at least in float32."""
    if tensors[0].device.type == "cpu" and max([x.numel() for x in tensors]) > _LONG:
        flat = [widen(x).flatten() for x in tensors]
        return torch.stack([torch.dot(x, x) for x in flat])
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, wide)).square()


def runs_fused(tensors: States) -> bool:
    """Return whether torch's fused optimizers on a CPU take these, and nothing does better."""
    if torch.compiler.is_compiling():  # which fuses the plain operations itself
        return False
    plain = _plain(tensors)
    dtype = plain[0].dtype if plain else None
    return (
        len(plain) == len(tensors)
        and dtype in (torch.float32, torch.float64)
        and all(x.is_cpu and x.dtype == dtype and x.is_contiguous() for x in plain)
    )


def _copies(
    params: Tensors, scratch: Tensor | None, weight_decay: float
) -> tuple[list[Tensor], float]:
    """What torch's fused AdamW makes directions of, and its λ'.

    Its x(1 − lr·λ') − lr·m̂/(√v̂ + ε) is the direction at lr = −1 and λ' = λ − 1, or of −x, of which
    one call makes small tensors, at λ' = −1 − λ.
    """
    if weight_decay and sum(map(Tensor.numel, params)) <= _LONG * len(params):
        return list(torch._foreach_neg(list(params))), -1.0 - weight_decay
    directions = carved(params, scratch)
    if not weight_decay:
        torch._foreach_zero_(directions)
        return directions, 0.0
    torch._foreach_copy_(directions, list(params))
    return directions, weight_decay - 1.0


def _plain(states: States) -> list[Tensor]:
    return [x for x in states if isinstance(x, Tensor) and type(x) in (Tensor, Parameter)]


def _spans(sizes: Sequence[int], span: int, alone: int | None) -> list[slice]:
    least = span if alone is None else alone
    starts, total = [0], 0
    for i, size in enumerate(sizes):
        room = size if size < least else span + 1
        total += room
        if total > span and i > starts[-1]:
            starts.append(i)
            total = room
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)], strict=True)]
