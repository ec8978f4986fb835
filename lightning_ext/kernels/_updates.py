"""AdamW, Lion and SGD over lists of parameters, each in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._updates._checks import (
    Lists,
    Options,
    States,
    UpdateOptions,
)
from lightning_ext.functional._updates._settings import check_betas, check_momentum
from lightning_ext.kernels._update_calls import for_launch, wants_launch

Tensors = Sequence[Tensor]


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
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``functional.adamw_update`` for every parameter, in place; the gradients stay.

    Nothing waits for the device: ``lr`` and the counts of steps are read there. Second moments in
    "int4" take a launch for their maxima before.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape; dtypes may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``functional.QuantizedState``.
        exp_avg_sqs: v of each, as m.
        steps: t of each, a float32 tensor of one entry, already counting this step; on the
            parameters' device, as those on the CPU are copied at each call.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: False adds λw to g instead.
        maximize: take −g for g.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Raises:
        ValueError: if the lists do not fit together, or one of ``betas`` is out of range.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, m, v, t = torch.ones(2), torch.zeros(2), torch.zeros(2), torch.tensor(1.0)
        >>> adamw_update_([w], [torch.tensor([3.0, -0.5])], [m], [v], [t], lr=0.1, weight_decay=0.0)
        >>> w
        tensor([0.9000, 1.1000])
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if not wants_launch("adamw_update_", fused, lists, steps):
        functional.adamw_update_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            **options,
        )
        return
    check_betas(betas)
    rule = "adamw" if decoupled_weight_decay else "adam"
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    numbers = (*_shares(betas), *logs, float(eps), float(weight_decay))
    _launch("adamw_update_", rule, numbers, lists, steps, Options(**options), lr, maximize)


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
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``functional.lion_update`` for every parameter, in place; the gradients stay.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape; dtypes may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``functional.QuantizedState``.
        steps: of each, a float32 tensor of one entry, already counting this step; needed where
            something is rounded at random.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        betas: β₁ and β₂, each in [0, 1).
        weight_decay: λ.
        maximize: take −g for g.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Raises:
        ValueError: if the lists do not fit together, or one of ``betas`` is out of range.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, m = torch.ones(2), torch.tensor([4.0, -1.0]), torch.tensor([-0.1, 0.0])
        >>> lion_update_([w], [g], [m], lr=0.25, betas=(0.5, 0.5))
        >>> w, m
        (tensor([0.7500, 1.2500]), tensor([ 1.9500, -0.5000]))
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs}
    if not wants_launch("lion_update_", fused, lists, steps):
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        functional.lion_update_(
            params, grads, exp_avgs, steps, **settings, maximize=maximize, **options
        )
        return
    check_betas(betas)
    numbers = (*_shares(betas), float(weight_decay))
    _launch("lion_update_", "lion", numbers, lists, steps, Options(**options), lr, maximize)


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
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> None:
    """Do ``functional.sgd_update`` for every parameter, in place; the gradients stay.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape; dtypes may differ.
        grads: g of each.
        momentum_buffers: b of each, a tensor or a ``functional.QuantizedState``, zeros at first;
            not needed where ``momentum`` is 0.
        steps: t of each, a float32 tensor of one entry, already counting this step. With
            dampening it tells the first ones, t ≤ 1, and is read on the device; ``None`` where
            there are none. Needed also where something is rounded at random.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        momentum: μ.
        dampening: τ.
        weight_decay: λ.
        nesterov: look ahead.
        maximize: take −g for g.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Raises:
        ValueError: if the lists or the settings do not fit together.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, b = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
        >>> sgd_update_([w], [g], [b], lr=0.25, momentum=0.5)
        >>> w, b
        (tensor([0.]), tensor([4.]))
    """
    lists: Lists = {"params": params, "grads": grads}
    if momentum and momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    if not wants_launch("sgd_update_", fused, lists, steps):
        functional.sgd_update_(
            params,
            grads,
            momentum_buffers,
            steps,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            **options,
        )
        return
    check_momentum(momentum, dampening, momentum_buffers is not None, nesterov=nesterov)
    rule = ("nesterov" if nesterov else "momentum") if momentum else "sgd"
    firsts = 1.0 if dampening and steps is not None else -math.inf
    numbers = (float(momentum), 1.0 - dampening, float(weight_decay), firsts)
    _launch("sgd_update_", rule, numbers, lists, steps, Options(**options), lr, maximize)


def _shares(betas: tuple[float, float]) -> tuple[float, float, float, float]:
    return float(betas[0]), 1.0 - betas[0], float(betas[1]), 1.0 - betas[1]


def _launch(
    op: str,
    rule: str,
    numbers: tuple[float, ...],
    lists: Lists,
    steps: Tensors | None,
    options: Options,
    lr: Tensor | float,
    maximize: bool,
) -> None:
    rate, placed, steps = for_launch(op, lists, steps, options, lr, several_formats=True)
    params, grads, *states = lists.values()
    if not params:
        return
    from lightning_ext.kernels._triton._updates import _elementwise as _updates

    call = _updates.Call(rule, numbers, rate, maximize, placed)
    _updates.update_(call, params, grads, states, steps)
