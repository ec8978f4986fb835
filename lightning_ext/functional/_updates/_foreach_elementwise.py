"""AdamW, Lion and SGD in place, over lists of parameters.

Differs: on a CPU Lion is made of two calls of torch's fused SGD, whose w ← w − lr·(g + λw) is also
    m ← βm + (1 − β)g, for lr = β − 1 and λ = −1, on as many parameters as the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_ext.functional._updates._adam_directions import Tensors
from lightning_ext.functional._updates._checks import (
    Options,
    States,
    UpdateOptions,
    check_lists,
)
from lightning_ext.functional._updates._elementwise import (
    adamw_update,
    lion_update,
    sgd_update,
)
from lightning_ext.functional._updates._lists import is_skipped, scaled_lists, update_one_by_one
from lightning_ext.functional._updates._settings import check_betas, check_momentum

_PLAIN_SGD: dict[str, Any] = {
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "is_first_step": False,
}


@torch.no_grad()
def adamw_update_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Tensors,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``adamw_update`` for every parameter, in place; the gradients stay.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape and device; dtypes
            may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``QuantizedState``.
        exp_avg_sqs: v of each, as m.
        steps: t of each, a float32 tensor of one entry, already counting this step; on the CPU or
            beside the parameter.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: False adds λw to g instead.
        maximize: take −g for g.
        options: numbers, or tensors as ``lr`` may be one: ``grad_scale``, which g is divided by;
            ``clip``, which it is multiplied by; ``found_inf``, which leaves the step out where it
            is not 0 (to take it back from ``steps`` is the caller's). Then ``weight_errors``, int8,
            of weights that ``split_weight`` has split; ``rounding="stochastic"`` of bfloat16
            weights, with ``seed`` and ``stream`` of its bits, see ``random_bits``: each parameter
            takes 4 streams.

    Raises:
        ValueError: if the lists do not fit together, or one of ``betas`` is out of range.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, m, v, t = torch.ones(2), torch.zeros(2), torch.zeros(2), torch.tensor(1.0)
        >>> adamw_update_([w], [torch.tensor([3.0, -0.5])], [m], [v], [t], lr=0.1, weight_decay=0.0)
        >>> w
        tensor([0.9000, 1.1000])
    """
    check_betas(betas)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lr, chosen, in_torch = check_lists("adamw_update_", lists, steps, Options(**options), lr)
    if is_skipped(chosen):
        return
    shared: dict[str, Any] = {"weight_decay": weight_decay, "maximize": maximize, "eps": eps}
    shared |= {"lr": lr}
    fused: Any = torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_
    update = partial(fused, **shared, beta1=betas[0], beta2=betas[1], amsgrad=False)
    if in_torch:
        for *part, counts in scaled_lists((params, grads, exp_avgs, exp_avg_sqs, steps), chosen):
            update(*part, [], counts)
        return

    def one(*row: Tensor) -> tuple[Tensor, ...]:
        param, grad, *moments, step = row
        update([param], [grad], *([x] for x in moments), [], [step])
        return param, *moments

    shared |= {"betas": betas, "decoupled_weight_decay": decoupled_weight_decay}
    formula, states = partial(adamw_update, **shared), (exp_avgs, exp_avg_sqs)
    update_one_by_one(formula, params, grads, states, steps, chosen, in_torch=one)


@torch.no_grad()
def lion_update_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: States,
    steps: Tensors | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``lion_update`` for every parameter, in place; the gradients stay.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape and device; dtypes
            may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``QuantizedState``.
        steps: of each, a float32 tensor of no dimension, already counting this step; needed where
            something is rounded at random.
        lr: rate, as in ``adamw_update_``.
        betas: β₁ and β₂, each in [0, 1).
        weight_decay: λ.
        maximize: take −g for g.
        options: as in ``adamw_update_``.

    Raises:
        ValueError: if the lists do not fit together, or one of ``betas`` is out of range.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, m = torch.ones(2), torch.tensor([4.0, -1.0]), torch.tensor([-0.1, 0.0])
        >>> lion_update_([w], [g], [m], lr=0.25, betas=(0.5, 0.5))
        >>> w, m
        (tensor([0.7500, 1.2500]), tensor([ 1.9500, -0.5000]))
    """
    check_betas(betas)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs}
    lr, chosen, in_torch = check_lists("lion_update_", lists, steps, Options(**options), lr)
    if is_skipped(chosen):
        return
    shared: dict[str, Any] = {"weight_decay": weight_decay, "maximize": maximize}
    shared |= {"lr": lr, "betas": betas}
    if in_torch:
        for part in scaled_lists((params, grads, exp_avgs), chosen, cached=True):
            _lion_in_cache(*part, **shared)
        return

    def formula(param: Tensor, grad: Tensor, mean: Tensor, step: Tensor | None) -> Any:
        return lion_update(param, grad, mean, **shared)

    def one(param: Tensor, grad: Tensor, mean: Tensor, step: Tensor | None) -> Any:
        _lion_in_cache([param], [grad], [mean], **shared)
        return param, mean

    update_one_by_one(formula, params, grads, (exp_avgs,), steps, chosen, in_torch=one)


@torch.no_grad()
def sgd_update_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: States | None = None,
    steps: Tensors | None = None,
    *,
    lr: Tensor | float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``sgd_update`` for every parameter, in place; the gradients stay.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape and device; dtypes
            may differ.
        grads: g of each.
        momentum_buffers: b of each, a tensor or a ``QuantizedState``, zeros at first; not needed
            where ``momentum`` is 0.
        steps: t of each, a float32 tensor of no dimension, already counting this step. With
            dampening it tells the first ones, t ≤ 1; ``None`` where there are none. Needed also
            where something is rounded at random.
        lr: rate, as in ``adamw_update_``.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: look ahead.
        maximize: take −g for g.
        options: as in ``adamw_update_``.

    Raises:
        ValueError: if the lists or the settings do not fit together.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, b = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
        >>> sgd_update_([w], [g], [b], lr=0.25, momentum=0.5)
        >>> w, b
        (tensor([0.]), tensor([4.]))
    """
    check_momentum(momentum, dampening, momentum_buffers is not None, nesterov=nesterov)
    buffers = momentum_buffers if momentum and momentum_buffers is not None else None
    lists: dict[str, States] = {"params": params, "grads": grads}
    lists |= {} if buffers is None else {"momentum_buffers": buffers}
    lr, chosen, in_torch = check_lists("sgd_update_", lists, steps, Options(**options), lr)
    shared: dict[str, Any] = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    shared |= {"weight_decay": weight_decay, "maximize": maximize}
    if is_skipped(chosen):
        return
    shared |= {"lr": lr}
    if in_torch:
        firsts = [False] * len(params)
        if steps is not None:
            firsts = [_is_first(step, dampening) for step in steps]
        columns = (params, grads) if buffers is None else (params, grads, buffers)
        _sgd_in_torch(columns, firsts, chosen, shared)
        return
    if buffers is not None:
        formula, one = partial(sgd_update, **shared), partial(_sgd_of_one, **shared)
        update_one_by_one(formula, params, grads, (buffers,), steps, chosen, in_torch=one)
        return

    def alone(param: Tensor, grad: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return sgd_update(param, grad, **shared)

    update_one_by_one(alone, params, grads, (), steps, chosen)


def _lion_in_cache(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: Tensor | float,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
) -> None:
    # sign(g + β₁/(1 − β₁)·m) is the sign of β₁m + (1 − β₁)g in fewer passes.
    ratio = betas[0] / (1 - betas[0])
    signs = list(torch._foreach_add(grads, exp_avgs, alpha=-ratio if maximize else ratio))
    torch._foreach_sign_(signs)
    shared: dict[str, Any] = _PLAIN_SGD | {"maximize": maximize}
    torch._fused_sgd_(params, signs, [], **shared, lr=lr, weight_decay=weight_decay)
    torch._fused_sgd_(exp_avgs, grads, [], **shared, lr=betas[1] - 1, weight_decay=-1.0)


def _is_first(step: Tensor | None, dampening: float) -> bool:
    """Whether a step is the first one, where that matters."""
    return bool(dampening) and step is not None and float(step) <= 1


def _sgd_of_one(
    param: Tensor, grad: Tensor, buffer: Tensor, step: Tensor | None, **shared: Any
) -> tuple[Tensor, Tensor]:
    first = _is_first(step, shared["dampening"])
    torch._fused_sgd_([param], [grad], [buffer], **shared, is_first_step=first)
    return param, buffer


def _sgd_in_torch(
    columns: tuple[Sequence[Any], ...],
    firsts: list[bool],
    options: Options,
    shared: dict[str, Any],
) -> None:
    """The fused SGD of torch, for the parameters at their first step and for the others."""
    for is_first in sorted(set(firsts)):
        places = [i for i, first in enumerate(firsts) if first == is_first]
        chosen = [[column[i] for i in places] for column in columns]
        for params, grads, *buffers in scaled_lists(chosen, options):
            kept = buffers[0] if buffers else []
            torch._fused_sgd_(params, grads, kept, **shared, is_first_step=is_first)
