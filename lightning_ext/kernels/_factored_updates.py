"""CAME over lists of parameters, in as many launches for a thousand as for one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import FactoredState
from lightning_ext.functional._updates._adam_directions import States
from lightning_ext.functional._updates._checks import Lists, Options, UpdateOptions
from lightning_ext.functional._updates._entries import check_columns
from lightning_ext.functional._updates._factored import Reduce
from lightning_ext.functional._updates._foreach_factored import check_factors
from lightning_ext.functional._updates._settings import check_came
from lightning_ext.kernels._update_calls import for_launch, wants_launch


@torch.no_grad()
def came_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: States,
    states: Sequence[FactoredState],
    steps: Sequence[Tensor] | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    reduce: Reduce | None = None,
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``functional.came_update`` for every matrix, in place; the gradients stay.

    Eleven launches for all matrices, and nothing of their size beside them; one more where momenta
    are kept in few bits. Nothing waits for the device.

    Args:
        params: θ of each matrix. In the first three lists the i-th ones have one shape; dtypes may
            differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``functional.QuantizedState``.
        states: r, c, R and C of each; in float32 for the kernels.
        steps: of each, a float32 tensor of one entry, already counting this step; needed where
            something is rounded at random.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        betas: β₁, β₂ and β₃, each in [0, 1).
        eps: ε₁ and ε₂.
        clip_threshold: d.
        weight_decay: λ.
        maximize: take −g for g.
        reduce: where the tensors are shards along dimension 0: given a vector of sums of all
            matrices, returns their sums over the shards; called three times.
        fused: ``None``, the kernels on CUDA; ``True``, the kernels or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Returns:
        What each û was multiplied by to have an RMS of at most d, shape (matrices,); 1 where the
        step is left out.

    Raises:
        ValueError: if the lists do not fit together, or a parameter has fewer than two dimensions.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, m = torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2, 2)
        >>> zeros = FactoredState(*torch.zeros(4, 2).unbind())
        >>> came_update_([w], [g], [m], [zeros], lr=0.1, betas=(0.5, 0.75, 0.9))
        tensor([0.5000])
    """
    lists: Lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs}
    settings = _settings(lr, betas, eps, clip_threshold, weight_decay, maximize, reduce)
    check_columns("came_update_", {"states": states})
    if not wants_launch("came_update_", fused, lists, steps, [*chain(*states)]):
        settings |= options
        return functional.came_update_(params, grads, exp_avgs, states, steps, **settings)
    rate, placed, counts = for_launch("came_update_", lists, steps, Options(**options), lr)
    settings |= {"lr": rate, "options": placed}
    check_factors(params, states)
    if any(x.dtype != torch.float32 for x in chain(*states)):
        raise TypeError("came_update_(fused=True) got states that are not float32")
    if not params:
        return torch.zeros(0)
    from lightning_ext.kernels._triton._updates import _came

    return _came.came_update_(params, grads, exp_avgs, states, counts, **settings)


@torch.no_grad()
def came_vector_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: States,
    exp_avg_sqs: States,
    steps: Sequence[Tensor] | None = None,
    *,
    lr: Tensor | float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    reduce: Reduce | None = None,
    fused: bool | None = None,
    **options: Unpack[UpdateOptions],
) -> Tensor:
    """Do ``functional.came_vector_update`` for every parameter, in place; the gradients stay.

    Three launches for all parameters, one or two more where second moments are kept in few bits.
    Nothing waits for the device.

    Args:
        params: θ of each parameter. In all lists the i-th ones have one shape; dtypes may differ.
        grads: g of each.
        exp_avgs: m of each, a tensor or a ``functional.QuantizedState``.
        exp_avg_sqs: v of each, as m.
        steps: of each, a float32 tensor of one entry, already counting this step; needed where
            something is rounded at random.
        lr: rate, a number, or a tensor of one entry on the CPU or the parameters' device.
        betas: β₁, β₂ and one that is not used here.
        eps: ε₁ and one that is not used here.
        clip_threshold: d.
        weight_decay: λ.
        maximize: take −g for g.
        reduce: where the tensors are shards: given a vector of sums of all parameters, returns
            their sums over the shards.
        fused: ``None``, the kernels on CUDA; ``True``, the kernels or an error; ``False``, torch.
        options: as in ``functional.adamw_update_``.

    Returns:
        What each û was multiplied by to have an RMS of at most d, shape (parameters,); 1 where the
        step is left out.

    Raises:
        ValueError: if the lists do not fit together.
        TypeError: for dtypes that have no update.

    Example:
        >>> w, g, (m, v) = torch.zeros(2), torch.tensor([3.0, -5.0]), torch.zeros(2, 2)
        >>> came_vector_update_([w], [g], [m], [v], lr=1.0, betas=(0.5, 0.75, 0.9))
        tensor([0.5000])
    """
    op = "came_vector_update_"
    lists: Lists = {"params": params, "grads": grads}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    settings = _settings(lr, betas, eps, clip_threshold, weight_decay, maximize, reduce)
    if not wants_launch(op, fused, lists, steps):
        return functional.came_vector_update_(
            params, grads, exp_avgs, exp_avg_sqs, steps, **settings, **options
        )
    rate, placed, counts = for_launch(op, lists, steps, Options(**options), lr)
    settings |= {"lr": rate, "options": placed}
    if not params:
        return torch.zeros(0)
    from lightning_ext.kernels._triton._updates import _came_vectors

    lists_of_states = exp_avgs, exp_avg_sqs
    return _came_vectors.came_vector_update_(params, grads, *lists_of_states, counts, **settings)


def _settings(
    lr: Tensor | float,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip_threshold: float,
    weight_decay: float,
    maximize: bool,
    reduce: Reduce | None,
) -> dict[str, Any]:
    check_came(betas, eps)
    return {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "clip_threshold": clip_threshold,
        "weight_decay": weight_decay,
        "maximize": maximize,
        "reduce": reduce,
    }
