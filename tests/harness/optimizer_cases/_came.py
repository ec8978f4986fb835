"""CAME."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness._optimizer_case import Groups, OptimizerCase
from lightning_ext import optim


def _came(_: nn.Module, groups: Groups, **how: Any) -> optim.CAME:
    return optim.CAME(groups, **{"lr": 0.01, "weight_decay": 0.1} | how)


CASES = {
    "CAME": OptimizerCase(
        _came,
        lr=0.01,
        fused=True,
        wide=("exp_avg_sq", "sq_row", "sq_col", "res_row", "res_col"),
        settings=({"clip_threshold": 0.5, "eps": (1e-8, 1e-6)}, {"betas": (0.8, 0.9, 0.95)}),
    )
}
