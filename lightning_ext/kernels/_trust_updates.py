"""LAMB and LARS over lists of parameters, in as many launches for a thousand as for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._updates._adam_directions import States
from lightning_ext.functional._updates._checks import Lists, Options, UpdateOptions
from lightning_ext.functional._updates._settings import check_betas, check_share
from lightning_ext.functional._updates._trust import Reduce
from lightning_ext.kernels._update_calls import for_launch, wants_launch


@torch.no_grad()
def lamb_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Sequence[Tensor],
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    trust_ratio: bool = True,
    norm_range: tuple[float, float] | None = None,
    trust_clip: float | None = None,
    bias_correction: bool = True,
    maximize: bool = False,
    reduce: Reduce | None = None,
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``functional.lamb_update`` for every parameter, in place; the gradients stay.

    Three launches: moments and sums, ratios, the step, along the direction that is made again from
    the moments; one more where these are kept in few bits. Nothing waits for the device.

    Args:
        params: x of each parameter. In all lists the i-th ones have one shape; dtypes may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``functional.QuantizedState``.
        exp_avg_sqs: v of each, as m.
        steps: t of each, a float32 tensor of one entry, already counting this step; on the
            parameters' device, as those on the CPU are copied at each call.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        trust_ratio: False for biases and the parameters of norm layers.
        norm_range: smallest and largest value of φ.
        trust_clip: the largest ratio.
        bias_correction: of both moments.
        maximize: take −g for g.
        reduce: given ‖x‖² and ‖u‖² of every parameter, shape (parameters, 2), returns their sums
            over the shards, for instance by one all-reduce.
        fused: ``None``, the kernels on CUDA; ``True``, the kernels or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Returns:
        The trust ratios, shape (parameters,); those of norms of 0 where the step is left out.

    Raises:
        ValueError: if the lists do not fit together, or one of ``betas`` is out of range.
        TypeError: for dtypes that have no update.

    Example:
        >>> x, m, v, t = torch.tensor([3.0, 4.0]), torch.zeros(2), torch.zeros(2), torch.tensor(1.0)
        >>> lamb_update_([x], [torch.ones(2)], [m], [v], [t], lr=0.1, weight_decay=0.0)
        tensor([3.5355])
    """
    lists: Lists = {"params": params, "grads": grads}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    settings: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "trust_ratio": trust_ratio,
        "norm_range": norm_range,
        "trust_clip": trust_clip,
        "bias_correction": bias_correction,
        "maximize": maximize,
        "reduce": reduce,
    }
    check_betas(betas)
    if not wants_launch("lamb_update_", fused, lists, steps):
        settings |= options
        return functional.lamb_update_(params, grads, exp_avgs, exp_avg_sqs, steps, **settings)
    rate, placed, counts = for_launch("lamb_update_", lists, steps, Options(**options), lr)
    if not params:
        return torch.zeros(0)
    from lightning_ext.kernels._triton._updates import _lamb

    settings |= {"lr": rate, "options": placed}
    return _lamb.lamb_update_(params, grads, exp_avgs, exp_avg_sqs, counts, **settings)


@torch.no_grad()
def lars_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: States,
    steps: Sequence[Tensor] | None = None,
    *,
    lr: Tensor | float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    trust_ratio: bool = True,
    larc: bool = False,
    nesterov: bool = False,
    lr_in_momentum: bool = False,
    maximize: bool = False,
    reduce: Reduce | None = None,
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``functional.lars_update`` for every parameter, in place; the gradients stay.

    Three launches: sums, ratios, the step. Nothing waits for the device.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape; dtypes may differ.
        grads: g of each.
        momentum_buffers: v of each, a tensor or a ``functional.QuantizedState``.
        steps: of each, a float32 tensor of one entry, already counting this step; needed where
            something is rounded at random.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        momentum: m in [0, 1).
        weight_decay: λ.
        trust_coefficient: η.
        eps: ε.
        trust_ratio: False for biases and the parameters of norm layers.
        larc: take min(τ/lr, 1) for τ.
        nesterov: look ahead.
        lr_in_momentum: the paper's form.
        maximize: take −g for g.
        reduce: given ‖w‖² and ‖g‖² of every parameter, shape (parameters, 2), returns their sums
            over the shards, for instance by one all-reduce.
        fused: ``None``, the kernels on CUDA; ``True``, the kernels or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Returns:
        What each gradient was multiplied by: τ, or min(τ/lr, 1) where it is clipped; shape
        (parameters,); 1 where the step is left out.

    Raises:
        ValueError: if the lists do not fit together.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, v = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 100.0]), torch.zeros(2)
        >>> lars_update_([w], [g], [v], lr=1.0, weight_decay=0.0, trust_coefficient=0.1)
        tensor([0.0050])
    """
    lists: Lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers}
    settings: dict[str, Any] = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "trust_coefficient": trust_coefficient,
        "eps": eps,
        "trust_ratio": trust_ratio,
        "larc": larc,
        "nesterov": nesterov,
        "lr_in_momentum": lr_in_momentum,
        "maximize": maximize,
        "reduce": reduce,
    }
    check_share("momentum", momentum)
    if not wants_launch("lars_update_", fused, lists, steps):
        settings |= options
        return functional.lars_update_(params, grads, momentum_buffers, steps, **settings)
    rate, placed, counts = for_launch("lars_update_", lists, steps, Options(**options), lr)
    if not params:
        return torch.zeros(0)
    from lightning_ext.kernels._triton._updates import _lars

    settings |= {"lr": rate, "options": placed}
    return _lars.lars_update_(params, grads, momentum_buffers, counts, **settings)
