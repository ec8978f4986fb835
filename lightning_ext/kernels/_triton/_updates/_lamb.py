"""LAMB over lists of parameters: moments and sums, ratios, then the step along what is made again.

The direction is made again, so that nothing of the parameters' size is kept between the launches:
from plain moments, which the first launch writes; else from the old ones and the gradient, as a
second moment in few bits may have lost nearly all of its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.functional._updates._checks import Options
from lightning_ext.functional._updates._trust import Reduce
from lightning_ext.functional._updates._trust import lamb_trust as ratios
from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._states._columns import State
from lightning_ext.kernels._triton._updates._layout import (
    Launch,
    grad_factor,
    is_left_out,
    launch_over,
    load_column,
    number,
    offsets_of,
)
from lightning_ext.kernels._triton._updates._moments import (
    adam_direction,
    inverse_corrections,
    load_moments,
    log_betas_of,
    moved_moments,
    rates_of,
)
from lightning_ext.kernels._triton._updates._trust_sums import lamb_trust, store_sums
from lightning_ext.kernels._triton._updates._weights import load_weight, store_weight

_BLOCK = 1024
_WARPS = 8


@triton.jit
def _direction(tile, moments, corrections, shape, L: tl.constexpr, MASKED: tl.constexpr):
    """The weights x and u = m̂/(√v̂ + ε) + λx; shape: ε and λ."""
    x = load_weight(tile, offsets_of(tile, L), L, MASKED)
    u = adam_direction(moments[0], moments[1], corrections[0], corrections[1], shape[0])
    return x, u + number(shape[1], False) * x


@triton.jit
def _move(
    tile, partials, factor, rates, log_betas, shape, random,
    CORRECTED: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, L: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    step, first, second = inverse_corrections(tile, log_betas, CORRECTED)
    grad = load_column(tile, 1, L, MASKED) * factor
    bits = (random[0], step.to(tl.int64), random[1])
    moments = moved_moments(tile, grad, rates, bits, STORE, L, MASKED)
    if SUMS:
        x, u = _direction(tile, moments, (first, second), shape, L, MASKED)
        store_sums(partials, x, u, offsets_of(tile, L), tile[4], MASKED)


@triton.jit(do_not_specialize=["count"])
def lamb_moments_kernel(
    table, chunks, count, books, partials, scaling, random, rates, log_betas, shape,
    CORRECTED: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Move the moments, where STORE in memory; leave Σx² and Σu² of the tile where SUMS."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    factor = grad_factor(scaling)
    if start + L.block <= size:
        _move(
            tile, partials, factor, rates, log_betas, shape, random,
            CORRECTED, STORE, SUMS, L, False,
        )  # fmt: skip
    else:
        _move(
            tile, partials, factor, rates, log_betas, shape, random,
            CORRECTED, STORE, SUMS, L, True,
        )  # fmt: skip


@triton.jit
def _step(
    tile, scale, factor, rates, random, log_betas, shape,
    CORRECTED: tl.constexpr, STORE: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    step, first, second = inverse_corrections(tile, log_betas, CORRECTED)
    bits = (random[0], step.to(tl.int64), random[1])
    if STORE:
        grad = load_column(tile, 1, L, MASKED) * factor
        moments = moved_moments(tile, grad, rates, bits, True, L, MASKED)
    else:
        moments = load_moments(tile, L, MASKED, True)
    x, u = _direction(tile, moments, (first, second), shape, L, MASKED)
    store_weight(tile, offsets_of(tile, L), x - scale * u, bits, L, MASKED)


@triton.jit(do_not_specialize=["count"])
def lamb_step_kernel(
    table, chunks, count, books, scaling, random, trust, lr, rates, log_betas, shape,
    LR_ON_DEVICE: tl.constexpr, TRUST: tl.constexpr, CORRECTED: tl.constexpr, STORE: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """The step x ← x − lr·trust·u of the moments, which are moved only now where STORE."""
    if is_left_out(scaling):
        return
    tensor, start, size = multi.locate(table, chunks, count, L.block)
    tile = (table, count, tensor, start, size, books)
    scale = number(lr, LR_ON_DEVICE)
    if TRUST:
        scale *= tl.load(trust + tensor)
    factor = grad_factor(scaling)
    if start + L.block <= size:
        _step(tile, scale, factor, rates, random, log_betas, shape, CORRECTED, STORE, L, False)
    else:
        _step(tile, scale, factor, rates, random, log_betas, shape, CORRECTED, STORE, L, True)


def lamb_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[State],
    exp_avg_sqs: Sequence[State],
    steps: Sequence[Tensor],
    *,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    trust_ratio: bool,
    norm_range: tuple[float, float] | None,
    trust_clip: float | None,
    bias_correction: bool,
    maximize: bool,
    reduce: Reduce | None,
    options: Options,
) -> Tensor:
    """Launch the kernels; arguments as in ``functional.lamb_update_``, checked by the caller."""
    lists = [params, grads], [exp_avgs, exp_avg_sqs]
    how: dict[str, Any] = {"others": [steps], "beta2": betas[1], "maximize": maximize}
    with launch_over(*lists, _BLOCK, options, **how) as launch:
        if not launch.tables.programs:
            sums = torch.zeros(len(params), 2, device=params[0].device)
            # Other ranks may have entries, and wait for this one.
            sums = sums if reduce is None or not trust_ratio else reduce(sums)
            return ratios(sums, norm_range=norm_range, trust_clip=trust_clip)
        shared: dict[str, Any] = {
            "rates": rates_of(betas),
            "log_betas": log_betas_of(betas),
            "shape": (float(eps), float(weight_decay)),
            "scaling": launch.scaling,
            "random": launch.random,
        }
        shared |= {"CORRECTED": bias_correction, "L": launch.layout, "num_warps": _WARPS}
        partials = launch.tables.table.new_empty(launch.tables.programs, 2, dtype=torch.float32)
        keeps, trust = launch.layout.keeps, None
        if trust_ratio or keeps:
            lamb_moments_kernel[(launch.tables.programs,)](
                *_head(launch), partials=partials, STORE=keeps, SUMS=trust_ratio, **shared
            )
        if trust_ratio:
            sums, trust = lamb_trust(launch, partials, norm_range, trust_clip)
            if reduce is not None:
                trust = ratios(reduce(sums), norm_range=norm_range, trust_clip=trust_clip)
        lamb_step_kernel[(launch.tables.programs,)](
            *_head(launch),
            trust=partials if trust is None else trust,
            lr=lr,
            LR_ON_DEVICE=isinstance(lr, Tensor),
            TRUST=trust is not None,
            STORE=not keeps,
            **shared,
        )
        return partials.new_ones(len(params)) if trust is None else trust


def _head(launch: Launch) -> tuple[Any, ...]:
    return launch.tables.table, launch.tables.chunks, launch.tables.count, launch.books
