"""AdamP in place, over lists of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from lightning_ext.functional._updates._adam_directions import (
    STREAMS,
    States,
    adam_directions_,
    wide_dtype,
)
from lightning_ext.functional._updates._checks import Options, UpdateOptions, check_lists
from lightning_ext.functional._updates._lists import update_by_spans
from lightning_ext.functional._updates._radial_projection import (
    Reduce,
    row_shares,
    row_sums,
    tensor_sums,
)
from lightning_ext.functional._updates._settings import check_betas


@torch.no_grad()
def adamp_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Sequence[Tensor],
    *,
    lr: Tensor | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    maximize: bool = False,
    reduce: Reduce | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``adamp_update`` for every parameter, in place; the gradients stay.

    Args:
        params: w of each parameter. In all lists the i-th ones have one shape and device; dtypes
            may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``QuantizedState``.
        exp_avg_sqs: v of each, as m.
        steps: t of each, a float32 tensor of one entry, already counting this step.
        lr: rate, as in ``adamw_update_``.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        delta: δ of ``radial_part``.
        wd_ratio: ρ where the update is projected.
        nesterov: look ahead.
        maximize: take −g for g.
        reduce: where the tensors are shards along dimension 0: given sums of every parameter, shape
            (parameters, 6), returns their sums over the shards, for instance by one all-reduce.
        options: as in ``adamw_update_``.

    Returns:
        1 for each parameter whose update was projected, else 0, shape (parameters,); 0 for those
        without entries, and where the step is left out.

    Raises:
        ValueError: if the lists do not fit together, or a setting is out of range.
        TypeError: for dtypes that have no update.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_betas(betas)
    lr, chosen, _ = check_lists("adamp_update_", lists, steps, Options(**options), lr)

    def update(part: slice, weights: list[Tensor], found: list[Tensor], scratch: Tensor) -> Tensor:
        directions = adam_directions_(
            weights,
            found,
            exp_avgs[part],
            exp_avg_sqs[part],
            steps[part],
            betas=betas,
            eps=eps,
            nesterov=nesterov,
            maximize=maximize,
            seed=chosen.seed,
            stream=chosen.stream + STREAMS * (part.start or 0),
            scratch=scratch,
        )
        shares, projected = _shares(weights, found, directions, delta, reduce)
        decay = lr * weight_decay * (1 - (1 - wd_ratio) * projected)
        for w, p, share, lost in zip(weights, directions, shares, decay.unbind(), strict=True):
            factor = 1 - lost if share is None else 1 - lost + lr * share
            _move_(w, p, factor, lr, scaled=share is not None or weight_decay != 0)
        return projected

    states, whole = (exp_avgs, exp_avg_sqs), reduce is not None
    return update_by_spans(update, params, grads, states, steps, chosen, whole=whole, left_out=0.0)


def _shares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    directions: Sequence[Tensor],
    delta: float,
    reduce: Reduce | None,
) -> tuple[list[Tensor | None], Tensor]:
    """What is taken out of each update, of the rows of its dimension 0, and whether it is."""
    dtype = wide_dtype(*directions)
    device = directions[0].device
    rows = [
        row_sums(w, g, p) if w.dim() > 1 else None
        for w, g, p in zip(params, grads, directions, strict=True)
    ]
    nothing = torch.zeros(6, dtype=dtype, device=device)
    totals = torch.stack(
        [
            nothing if row is None else tensor_sums(row, math.prod(w.shape[1:]), delta)
            for row, w in zip(rows, params, strict=True)
        ]
    )
    totals = totals if reduce is None else reduce(totals)
    shares: list[Tensor | None] = []
    projected = torch.zeros(len(rows), dtype=dtype, device=device)
    for i, (row, w) in enumerate(zip(rows, params, strict=True)):
        if row is None or not w.numel():
            shares.append(None)
            continue
        share, projected[i] = row_shares(row, totals[i], delta)
        shares.append(share.view(len(share), *[1] * (w.dim() - 1)))
    return shares, projected


def _move_(
    param: Tensor, update: Tensor, factor: Tensor, lr: Tensor | float, *, scaled: bool
) -> None:
    """The step w ← factor·w − lr·p."""
    if scaled and param.dtype != update.dtype:  # of one rounding
        param.copy_(param.to(update.dtype) * factor - lr * update)
        return
    if scaled:
        param.mul_(factor)
    if isinstance(lr, Tensor):
        param.sub_(update.mul_(lr))
    else:
        param.sub_(update, alpha=lr)
