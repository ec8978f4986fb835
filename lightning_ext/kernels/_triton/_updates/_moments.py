"""Adam's two moments inside a kernel: moved, stored in their formats, and the direction of both.

A launch has the columns 0 parameters, 1 gradients, 2 steps, then those of both moments.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lightning_ext.kernels._triton import _multi_tensor as multi
from lightning_ext.kernels._triton._updates._layout import (
    load_state_of,
    number,
    store_state_of,
)


@triton.jit
def one_minus_power(log_beta, step):
    """1 − βᵗ of log β and t, without the loss of digits where it is small."""
    x = tl.maximum(step * log_beta, -100.0)
    series = 1.0 + x / 8
    for k in tl.static_range(6):
        series = 1.0 + x / (7 - k) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def inverse_corrections(tile, log_betas, CORRECTED: tl.constexpr):
    """The steps of a tensor, 1/(1 − β₁ᵗ) and 1/(1 − β₂ᵗ), or ones."""
    where = multi.address(tile[0], tile[1], 2, tile[2])
    step = tl.load(where.to(tl.pointer_type(tl.float32)))
    first = step * 0 + 1.0
    second = step * 0 + 1.0
    if CORRECTED:
        first = 1.0 / one_minus_power(number(log_betas[0], False), step)
        second = 1.0 / one_minus_power(number(log_betas[1], False), step)
    return step, first, second


@triton.jit
def adam_direction(mean, square, first, second, eps):
    """m̂/(√v̂ + ε) of moments and inverse corrections."""
    return mean * first / (tl.sqrt_rn(square * second) + number(eps, False))


@triton.jit
def load_moments(tile, L: tl.constexpr, MASKED: tl.constexpr, WRITTEN: tl.constexpr):
    """Both moments."""
    mean = load_state_of(tile, L.states[0], L, MASKED, WRITTEN)
    return mean, load_state_of(tile, L.states[1], L, MASKED, WRITTEN)


@triton.jit
def next_moments(mean, square, grad, rates):
    """Both moments after a step; rates: 1 − β₁, β₂ and 1 − β₂."""
    mean += number(rates[0], False) * (grad - mean)
    return mean, number(rates[1], False) * square + number(rates[2], False) * grad * grad


@triton.jit
def moved_moments(
    tile, grad, rates, bits, STORE: tl.constexpr, L: tl.constexpr, MASKED: tl.constexpr
):
    """Both moments after a step, where STORE as ``store_state_of`` stores and returns them.

    rates: as in ``next_moments``. bits: as in ``store_state_of``.
    """
    mean, square = load_moments(tile, L, MASKED, False)
    mean, square = next_moments(mean, square, grad, rates)
    if STORE:
        mean = store_state_of(tile, mean, bits, 0, L.states[0], L, MASKED)
        square = store_state_of(tile, square, bits, 1, L.states[1], L, MASKED)
    return mean, square


def rates_of(betas: tuple[float, float]) -> tuple[float, float, float]:
    """Return 1 − β₁, β₂ and 1 − β₂."""
    return 1.0 - betas[0], float(betas[1]), 1.0 - betas[1]


def log_betas_of(betas: tuple[float, float]) -> tuple[float, float]:
    """Return log β of both, one so small that βᵗ is 0 for β = 0."""
    first, second = (math.log(beta) if beta > 0 else -1e30 for beta in betas)
    return first, second
