"""GaLore, Q-GaLore, Fira, GradNormLoRP, APOLLO and APOLLO-Mini."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from harness._optimizer_case import Groups, OptimizerCase
from lightning_ext import optim

RANKS = {"rank": 2, "update_proj_gap": 4}


def _maker(name: str, **settings: Any) -> Callable[..., Optimizer]:
    def make(_: nn.Module, groups: Groups, **how: Any) -> Optimizer:
        groups = [{"algorithm": "low_rank", **group} for group in groups]
        found: Optimizer = getattr(optim, name)(groups, **RANKS | settings | how)
        return found

    return make


# Subspaces are looked for when a count in host memory says so: each count would be compiled anew.
CASES = {
    "GaLore": OptimizerCase(
        _maker("GaLore", lr=0.05, scale=1.0, weight_decay=0.01),
        lr=0.05,
        compiled=False,
        settings=(
            {"subspace": "svd", "spread_refresh": False},
            {"subspace": "iteration", "state_dtype": "float32", "scale": 0.5},
            {"projection_dtype": "int4", "state_dtype": "bfloat16"},
        ),
    ),
    "QGaLore": OptimizerCase(
        _maker("QGaLore", lr=0.05, scale=1.0, update_proj_gap=2),
        lr=0.05,
        compiled=False,
        settings=({"cos_threshold": None}, {"state_dtype": "fp8", "update_proj_gap": 1}),
    ),
    "Fira": OptimizerCase(
        _maker("Fira", lr=0.03),
        lr=0.03,
        compiled=False,
        settings=({"alpha_in_residual": True, "scale": 0.25}, {"norm_growth": None}),
    ),
    "GradNormLoRP": OptimizerCase(
        _maker("GradNormLoRP", lr=0.05, scale=1.0, weight_decay=0.01),
        lr=0.05,
        compiled=False,
        settings=({"state_dtype": "int8"},),
    ),
    "APOLLO": OptimizerCase(
        _maker("APOLLO", lr=0.05),
        lr=0.05,
        compiled=False,
        settings=({"scale_type": "tensor"}, {"norm_growth": None, "state_dtype": "int4"}),
    ),
    "APOLLOMini": OptimizerCase(
        _maker("APOLLOMini", rank=1, lr=0.03, scale=4.0),
        lr=0.03,
        compiled=False,
        settings=({"scale_front": True, "seed": 3},),
    ),
}
