"""LowBitAdamW, whose small parameters stay in float32: what few bits do is told elsewhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness._optimizer_case import Groups, OptimizerCase
from lightning_ext import optim


def _adamw(_: nn.Module, groups: Groups, **how: Any) -> optim.LowBitAdamW:
    return optim.LowBitAdamW(groups, **{"lr": 0.02} | how)


CASES = {
    "LowBitAdamW": OptimizerCase(
        _adamw,
        lr=0.02,
        fused=True,
        settings=(
            {"weight_decay": 0.1, "decoupled_weight_decay": False},
            {"betas": (0.8, 0.99)},
        ),
    )
}
