"""What an optimizer makes of a Hessian: the scale of each coordinate, and the momentum.

Source: Cohen et al. 2021 (arXiv:2103.00065), 2022 (arXiv:2207.14484).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer

from lightning_ext import functional, scaling
from lightning_ext.optim import LowBitAdamW


class StepLimit(NamedTuple):
    """Of an optimizer with a step lr·c·P⁻¹: it diverges where lr·λ_max(s·H·s) > allowed.

    s² = P⁻¹·c·allowed/a, with c the group's learning rate over the first group's, a what its own
    momentum allows, 2(1 + μ) for the heavy ball, and allowed the first group's a. At the limit
    a − lr·c·P⁻¹·H becomes singular, where a mode turns by z = −1 at each step; beyond it |z| > 1,
    also where H couples groups of different momentum.

    Args:
        scales: s for all coordinates, or ``None`` where it is 1.
        allowed: That of the first group.
    """

    scales: Tensor | None
    allowed: float

    def lr(self, largest: float) -> float | None:
        """The learning rate of the first group that λ_max allows; ``None`` where it sets none."""
        return self.allowed / largest if largest > 0 else None


def step_limit(
    optimizer: Optimizer, parameters: Iterable[Parameter], dtype: torch.dtype
) -> StepLimit | None:
    """Reads the limit; its learning rate is the first group's, those of others go with it.

    Args:
        optimizer: SGD, Adam, AdamW or LowBitAdamW.
        parameters: In the order of the Hessian.
        dtype: Of the scales.

    Returns:
        ``None`` for another optimizer, one that maximizes, or one that has not stepped yet.
    """
    groups = optimizer.param_groups
    if not isinstance(optimizer, (SGD, Adam, LowBitAdamW)) or any(g["maximize"] for g in groups):
        return None
    of = {id(p): group for group in groups for p in group["params"]}
    first, allowed = float(groups[0]["lr"]), _allowed(groups[0])
    parts: list[Tensor] = []
    for parameter in parameters:
        group = of[id(parameter)]
        share = float(group["lr"]) / first if first > 0 else 1.0
        part = _inverse_root(optimizer, parameter, group, dtype)
        if part is None:
            return None
        share *= allowed / _allowed(group)
        parts.append((part * math.sqrt(share)).expand(parameter.shape).flatten())
    scales = torch.cat(parts)
    return StepLimit(None if bool((scales == 1).all()) else scales, allowed)


def _allowed(group: dict[str, Any]) -> float:
    if "betas" in group:
        beta = float(group["betas"][0])
        return scaling.stable_lr(1.0, momentum=beta, dampening=beta)
    return scaling.stable_lr(
        1.0,
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        nesterov=bool(group["nesterov"]),
    )


def _inverse_root(
    optimizer: Optimizer, parameter: Parameter, group: dict[str, Any], dtype: torch.dtype
) -> Tensor | None:
    """P^(−½), P = √v̂ + eps under Adam and 1 under SGD."""
    if isinstance(optimizer, SGD):
        return torch.ones((), dtype=dtype, device=parameter.device)
    state = optimizer.state.get(parameter, {})
    square = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if square is None:
        return None
    left = 1 - float(group["betas"][1]) ** float(state["step"])
    corrected = functional.decode_state(square).to(dtype) / left
    root: Tensor = (corrected.sqrt() + group["eps"]).rsqrt()
    return root
