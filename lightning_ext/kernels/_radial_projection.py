"""AdamP over lists of parameters, in as many launches for a thousand as for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._updates._adam_directions import States
from lightning_ext.functional._updates._checks import Lists, Options, UpdateOptions
from lightning_ext.functional._updates._radial_projection import Reduce
from lightning_ext.functional._updates._settings import check_betas
from lightning_ext.kernels._update_calls import for_launch, wants_launch


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
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``functional.adamp_update`` for every parameter, in place; the gradients stay.

    Three launches: moments and sums of rows, sums of tensors, the step; one or two more where
    moments are kept in few bits. Nothing waits for the device.

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
        delta: δ of ``functional.radial_part``.
        wd_ratio: ρ where the update is projected.
        nesterov: look ahead.
        maximize: take −g for g.
        reduce: where the tensors are shards along dimension 0: given sums of every parameter, shape
            (parameters, 6), returns their sums over the shards, for instance by one all-reduce.
        fused: ``None``, the kernels on CUDA; ``True``, the kernels or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Returns:
        1 for each parameter whose update was projected, else 0, shape (parameters,); 0 where the
        step is left out.

    Raises:
        ValueError: if the lists do not fit together, or one of ``betas`` is out of range.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, m, v, t = torch.tensor([[3.0, 4.0]]), *torch.zeros(2, 1, 2), torch.tensor(1.0)
        >>> adamp_update_([w], [torch.tensor([[-4.0, 3.0]])], [m], [v], [t], lr=0.1)
        tensor([1.])
    """
    lists: Lists = {"params": params, "grads": grads}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    settings: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "delta": delta,
        "wd_ratio": wd_ratio,
        "nesterov": nesterov,
        "maximize": maximize,
        "reduce": reduce,
    }
    check_betas(betas)
    if not wants_launch("adamp_update_", fused, lists, steps):
        settings |= options
        return functional.adamp_update_(params, grads, exp_avgs, exp_avg_sqs, steps, **settings)
    rate, placed, counts = for_launch("adamp_update_", lists, steps, Options(**options), lr)
    if not params:
        return torch.zeros(0)
    from lightning_ext.kernels._triton._updates import _adamp

    settings |= {"lr": rate, "options": placed}
    return _adamp.adamp_update_(params, grads, exp_avgs, exp_avg_sqs, counts, **settings)
