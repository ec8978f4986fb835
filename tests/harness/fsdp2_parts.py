"""Short runs of `Mixed` under FSDP2, and in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy

from harness.mixed_module import Mixed
from harness.strategy_cases import Case, Record, trained
from lightning_ext.strategies import FSDP2Strategy


def by_fsdp2(
    module: LightningModule | None = None, steps: int = 3, *, how: Any = None, **kwargs: Any
) -> Record:
    """What a fit on all ranks came to.

    Args:
        module: By default `Mixed` in float64.
        steps: Of the optimizer, each of four micro-batches.
        how: Options of `FSDP2Strategy`.
        kwargs: For `fit`.
    """
    return _by(lambda world: FSDP2Strategy(**(how or {})), module, steps, kwargs)


def by_one(module: LightningModule | None = None, steps: int = 3, **kwargs: Any) -> Record:
    """What the same came to in this process alone."""
    return _by(lambda world: "auto", module, steps, kwargs)


def _by(
    make: Callable[[int], Strategy | str],
    module: LightningModule | None,
    steps: int,
    kwargs: dict[str, Any],
) -> Record:
    return trained(Case(make), module or Mixed().double(), steps, **kwargs)
