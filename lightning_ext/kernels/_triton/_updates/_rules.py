"""The formulas of `functional._updates` on one tile in float32: a function each.

A rule takes the weight, the gradient, the states it has, the step, the rate and its numbers, and
gives back the weight and the states. To add one, write its function and name it in ``apply_rule``;
`_updates` does the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_ext.kernels._triton._updates._moments import one_minus_power


@triton.jit
def _adam_direction(g, m, v, step, beta1, rest1, beta2, rest2, log1, log2, eps):
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    root = tl.sqrt_rn(v) / tl.sqrt_rn(one_minus_power(log2, step))
    return m * (1 / one_minus_power(log1, step)) / (root + eps), m, v


@triton.jit
def _adamw(w, g, m, v, step, lr, numbers):
    beta1, rest1, beta2, rest2, log1, log2, eps, decay = numbers
    u, m, v = _adam_direction(g, m, v, step, beta1, rest1, beta2, rest2, log1, log2, eps)
    return w * (1 - lr * decay) - lr * u, m, v


@triton.jit
def _adam(w, g, m, v, step, lr, numbers):
    beta1, rest1, beta2, rest2, log1, log2, eps, decay = numbers
    g = g + decay * w
    u, m, v = _adam_direction(g, m, v, step, beta1, rest1, beta2, rest2, log1, log2, eps)
    return w - lr * u, m, v


@triton.jit
def _lion(w, g, m, lr, numbers):
    beta1, rest1, beta2, rest2, decay = numbers
    c = beta1 * m + rest1 * g
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))  # 0 of 0, nan of nan
    return w * (1 - lr * decay) - lr * sign, beta2 * m + rest2 * g


@triton.jit
def _sgd(w, g, lr, numbers):
    _, _, decay, _ = numbers
    return w - lr * (g + decay * w)


@triton.jit
def _momentum(w, g, b, step, lr, numbers, NESTEROV: tl.constexpr):
    momentum, rest, decay, firsts = numbers
    d = g + decay * w
    b = tl.where(step <= firsts, d, momentum * b + rest * d)
    if NESTEROV:
        return w - lr * (d + momentum * b), b
    else:
        return w - lr * b, b


@triton.jit
def apply_rule(w, g, s0, s1, step, lr, numbers, RULE: tl.constexpr):
    """The weight and two states after a step; states that a rule has not are given back."""
    if RULE == "adamw":
        w, s0, s1 = _adamw(w, g, s0, s1, step, lr, numbers)
    elif RULE == "adam":
        w, s0, s1 = _adam(w, g, s0, s1, step, lr, numbers)
    elif RULE == "lion":
        w, s0 = _lion(w, g, s0, lr, numbers)
    elif RULE == "momentum":
        w, s0 = _momentum(w, g, s0, step, lr, numbers, False)
    elif RULE == "nesterov":
        w, s0 = _momentum(w, g, s0, step, lr, numbers, True)
    else:
        w = _sgd(w, g, lr, numbers)
    return w, s0, s1
