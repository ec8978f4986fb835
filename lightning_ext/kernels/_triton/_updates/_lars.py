"""LARS over lists of parameters: sums, ratios, then the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._updates._checks import Options
from lightning_ext.functional._updates._trust import Reduce
from lightning_ext.functional._updates._trust import lars_trust as ratios
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._states._columns import State
from lightning_ext.kernels._triton._updates._layout import (
    grad_factor,
    is_left_out,
    launch_over,
    load_column,
    load_count,
    load_state_of,
    number,
    offsets_of,
    store_state_of,
)
from lightning_ext.kernels._triton._updates._trust_sums import lars_trust, store_sums
from lightning_ext.kernels._triton._updates._weights import load_weight, store_weight

_BLOCK = 1024
_WARPS = 8


@triton.jit
def _sums(tile, partials, factor, L: tl.constexpr, MASKED: tl.constexpr):
    w = load_weight(tile, offsets_of(tile, L), L, MASKED)
    g = load_column(tile, 1, L, MASKED) * factor
    store_sums(partials, w, g, offsets_of(tile, L), tile[4], MASKED)


@triton.jit(do_not_specialize=["count"])
def lars_sums_kernel(table, chunks, count, books, partials, scaling, L: tl.constexpr):
    """Leave Σw² and Σg² of the tile."""
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    if start + L.block <= size:
        _sums(tile, partials, grad_factor(scaling), L, False)
    else:
        _sums(tile, partials, grad_factor(scaling), L, True)


@triton.jit
def _step(
    tile, factor, inside, outside, momentum, weight_decay, bits,
    NESTEROV: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    w = load_weight(tile, offsets_of(tile, L), L, MASKED)
    g = load_column(tile, 1, L, MASKED) * factor
    buffer = load_state_of(tile, L.states[0], L, MASKED, False)
    scaled = (g + weight_decay * w) * inside
    update = momentum * buffer + scaled
    store_state_of(tile, update, bits, 0, L.states[0], L, MASKED)
    if NESTEROV:
        update = momentum * update + scaled
    store_weight(tile, offsets_of(tile, L), w - outside * update, bits, L, MASKED)


@triton.jit(do_not_specialize=["count"])
def lars_step_kernel(
    table, chunks, count, books, trust, lr, momentum, weight_decay, scaling, random,
    LR_ON_DEVICE: tl.constexpr, TRUST: tl.constexpr, LR_INSIDE: tl.constexpr,
    NESTEROV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The step v ← m·v + τ(g + λw), w ← w − lr·v, or with lr in v."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    inside = number(1.0, False)
    outside = number(lr, LR_ON_DEVICE)
    if TRUST:
        inside = tl.load(trust + tensor)
    if LR_INSIDE:
        inside *= outside
        outside = number(1.0, False)
    step = 0
    if L.states[0] == 3:
        step = load_count(tile, 2)
    bits = (random[0], step, random[1])
    m, decay, factor = number(momentum, False), number(weight_decay, False), grad_factor(scaling)
    if start + L.block <= size:
        _step(tile, factor, inside, outside, m, decay, bits, NESTEROV, L, False)
    else:
        _step(tile, factor, inside, outside, m, decay, bits, NESTEROV, L, True)


def lars_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[State],
    steps: Sequence[Tensor] | None,
    *,
    lr: Tensor | float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    trust_ratio: bool,
    larc: bool,
    nesterov: bool,
    lr_in_momentum: bool,
    maximize: bool,
    reduce: Reduce | None,
    options: Options,
) -> Tensor:
    """Launch the kernels; arguments as in ``functional.lars_update_``, checked by the caller."""
    counts = [] if steps is None else [steps]
    lists = [params, grads], [momentum_buffers]
    with launch_over(*lists, _BLOCK, options, others=counts, maximize=maximize) as launch:
        given = launch.tables
        settings = (trust_coefficient, weight_decay, eps)
        if not given.programs:
            sums = torch.zeros(len(params), 2, device=given.table.device)
            # Other ranks may have entries, and wait for this one.
            sums = sums if reduce is None or not trust_ratio else reduce(sums)
            return ratios(sums, _rate(lr, sums), *settings, clip=larc)
        shared: dict[str, Any] = {"L": launch.layout, "num_warps": _WARPS}
        head = given.table, given.chunks, given.count, launch.books
        trust = None
        if trust_ratio:
            partials = given.table.new_empty(given.programs, 2, dtype=torch.float32)
            lars_sums_kernel[(given.programs,)](*head, partials, launch.scaling, **shared)
            sums, trust = lars_trust(launch, partials, lr, *settings, clip=larc)
            if reduce is not None:
                trust = ratios(reduce(sums), _rate(lr, sums), *settings, clip=larc)
        lars_step_kernel[(given.programs,)](
            *head,
            params[0] if trust is None else trust,
            lr,
            float(momentum),
            float(weight_decay),
            launch.scaling,
            launch.random,
            LR_ON_DEVICE=isinstance(lr, Tensor),
            TRUST=trust is not None,
            LR_INSIDE=lr_in_momentum,
            NESTEROV=nesterov,
            **shared,
        )
        return torch.ones(len(params), device=given.table.device) if trust is None else trust


def _rate(lr: Tensor | float, like: Tensor) -> Tensor:
    return lr.to(like) if isinstance(lr, Tensor) else torch.full_like(like[0, 0], lr)
