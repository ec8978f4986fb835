"""Sums over each tensor of a list, from what the programs of a launch left, and ratios of norms."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_ext.kernels._triton._updates._layout import Launch, is_left_out, number

_STEP = 1024  # partial sums that are added at a time


@triton.jit
def store_sums(partials, x, y, offsets, size, MASKED: tl.constexpr):
    """Leave Σx² and Σy² of a tile."""
    if MASKED:
        x, y = tl.where(offsets < size, x, 0.0), tl.where(offsets < size, y, 0.0)
    pointer = partials + 2 * tl.program_id(0).to(tl.int64)
    tl.store(pointer, tl.sum(x * x))
    tl.store(pointer + 1, tl.sum(y * y))


@triton.jit
def add_up(partials, table, count, tensor, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The two sums of a tensor, in an order that does not change.

    partials: two numbers of each program of a launch over chunks of BLOCK entries.
    """
    size = tl.load(table + tensor)
    chunks = (size + BLOCK - 1) // BLOCK
    pointer = partials + tl.load(table + count + tensor) * 2
    first = tl.zeros((STEP,), tl.float32)
    second = tl.zeros((STEP,), tl.float32)
    for start in range(0, chunks, STEP):
        lane = start + tl.arange(0, STEP)
        inside = lane < chunks
        first += tl.load(pointer + lane * 2, mask=inside, other=0)
        second += tl.load(pointer + lane * 2 + 1, mask=inside, other=0)
    return tl.sum(first), tl.sum(second)


@triton.jit(do_not_specialize=["count"])
def lamb_trust_kernel(
    table,
    partials,
    sums,
    trust,
    count,
    low,
    high,
    trust_clip,
    scaling,
    RANGE: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """‖x‖², ‖u‖² and min(φ(‖x‖)/‖u‖, c) of each tensor; norms of a step left out are 0."""
    tensor = tl.program_id(0)
    weight_sq, direction_sq = add_up(partials, table, count, tensor, BLOCK, STEP)
    if is_left_out(scaling):
        weight_sq, direction_sq = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    tl.store(sums + 2 * tensor, weight_sq)
    tl.store(sums + 2 * tensor + 1, direction_sq)
    weight, direction = tl.sqrt_rn(weight_sq), tl.sqrt_rn(direction_sq)
    known = (weight > 0) & (direction > 0)
    if RANGE:
        weight = tl.minimum(tl.maximum(weight, number(low, False)), number(high, False))
    ratio = tl.where(known, tl.div_rn(weight, tl.where(known, direction, 1.0)), 1.0)
    if CLIP:
        ratio = tl.minimum(ratio, number(trust_clip, False))
    tl.store(trust + tensor, ratio)


@triton.jit(do_not_specialize=["count"])
def lars_trust_kernel(
    table,
    partials,
    sums,
    trust,
    count,
    lr,
    coefficient,
    weight_decay,
    eps,
    scaling,
    LR_ON_DEVICE: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """‖w‖², ‖g‖² and η‖w‖/(‖g‖ + λ‖w‖ + ε) of each tensor, over lr and at most 1 with CLIP.

    The norms of a step left out are 0.
    """
    tensor = tl.program_id(0)
    weight_sq, grad_sq = add_up(partials, table, count, tensor, BLOCK, STEP)
    if is_left_out(scaling):
        weight_sq, grad_sq = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    tl.store(sums + 2 * tensor, weight_sq)
    tl.store(sums + 2 * tensor + 1, grad_sq)
    weight, grad = tl.sqrt_rn(weight_sq), tl.sqrt_rn(grad_sq)
    known = (weight > 0) & (grad > 0)
    below = grad + number(weight_decay, False) * weight + number(eps, False)
    ratio = tl.div_rn(number(coefficient, False) * weight, tl.where(known, below, 1.0))
    if CLIP:
        rate = number(lr, LR_ON_DEVICE)
        ratio = tl.minimum(tl.div_rn(ratio, tl.where(rate > 0, rate, 1.0)), 1.0)
    tl.store(trust + tensor, tl.where(known, ratio, 1.0))


def lamb_trust(
    launch: Launch,
    partials: Tensor,
    norm_range: tuple[float, float] | None,
    trust_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch the reduction of LAMB; return sums, shape (tensors, 2), and ratios, (tensors,)."""
    count = launch.tables.count
    sums, trust = partials.new_empty(count, 2), partials.new_empty(count)
    low, high = norm_range or (0.0, 0.0)
    lamb_trust_kernel[(count,)](
        launch.tables.table,
        partials,
        sums,
        trust,
        count,
        float(low),
        float(high),
        float(trust_clip or 0.0),
        launch.scaling,
        RANGE=norm_range is not None,
        CLIP=trust_clip is not None,
        BLOCK=launch.layout.block,
        STEP=_STEP,
        num_warps=4,
    )
    return sums, trust


def lars_trust(
    launch: Launch,
    partials: Tensor,
    lr: Tensor | float,
    coefficient: float,
    weight_decay: float,
    eps: float,
    *,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the reduction of LARS; return sums, shape (tensors, 2), and ratios, (tensors,)."""
    count = launch.tables.count
    sums, trust = partials.new_empty(count, 2), partials.new_empty(count)
    lars_trust_kernel[(count,)](
        launch.tables.table,
        partials,
        sums,
        trust,
        count,
        lr,
        float(coefficient),
        float(weight_decay),
        float(eps),
        launch.scaling,
        LR_ON_DEVICE=isinstance(lr, Tensor),
        CLIP=clip,
        BLOCK=launch.layout.block,
        STEP=_STEP,
        num_warps=4,
    )
    return sums, trust
