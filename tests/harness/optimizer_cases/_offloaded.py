"""OffloadedStates around LAMB, a parameter a chunk."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness._optimizer_case import Groups, OptimizerCase
from lightning_ext import optim


def _offloaded(
    _: nn.Module, groups: Groups, chunk_bytes: int = 1, **how: Any
) -> optim.OffloadedStates:
    for group, ratio in zip(groups, (True, False), strict=False):
        group["trust_ratio"] = ratio
    base = optim.LAMB(groups, **{"lr": 0.03, "weight_decay": 0.1} | how)
    return optim.OffloadedStates(base, chunk_bytes=chunk_bytes)


CASES = {
    # It is for one device, and its chunks are made in Python, as states appear.
    "OffloadedStates": OptimizerCase(
        _offloaded,
        lr=0.03,
        fused=True,
        sharded=False,
        compiled=False,
        settings=({"chunk_bytes": 2**10, "bias_correction": False},),
    )
}
