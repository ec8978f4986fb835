"""Callbacks that need whole parameters or gradients, under FSDP2 by Lightning and by ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Classifier, fit, fsdp2, fsdp2_strategy, loader, run_distributed, shard
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor

from lightning_ext.callbacks import (
    AdaptiveBatchSize,
    CriticalBatchSize,
    Curvature,
    GradientNoiseScale,
    LocalGradients,
    MicroBatchFinder,
)

CALLBACKS: dict[str, Any] = {
    "CriticalBatchSize": lambda: CriticalBatchSize(every_samples=32),
    "Curvature": Curvature,
    "MicroBatchFinder": MicroBatchFinder,
}

GRADIENTS: dict[str, Any] = {
    "single samples": lambda: GradientNoiseScale(source="per_sample"),
    "consecutive steps": lambda: GradientNoiseScale(source="consecutive_steps"),
    "another geometry": lambda: GradientNoiseScale(geometry="l1"),
    "inner products": lambda: GradientNoiseScale(tests=("inner_products",)),
    "a gradient test": lambda: AdaptiveBatchSize("inner_product", max_global_batch=64),
    "local gradients": LocalGradients,
}


class Sharded(Classifier):
    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            shard(self.net, self.device_mesh)


def refusal(name: str, kind: str) -> str:
    settings = fsdp2_strategy(2) if kind == "FSDP2Strategy" else fsdp2(2)
    module = Classifier(dropout=0) if kind == "FSDP2Strategy" else Sharded(dropout=0)
    callback = (CALLBACKS | GRADIENTS)[name]()
    with pytest.raises(MisconfigurationException) as caught:
        fit([callback], module=module.double(), train=loader(dtype=torch.float64), **settings)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["ModelParallelStrategy", "FSDP2Strategy"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_what_needs_whole_parameters_says_so(name: str, kind: str) -> None:
    for message in run_distributed(refusal, args=(name, kind)):
        assert message.startswith(f"{name} needs whole parameters on every rank")
        assert f"{kind} splits them; allowed are a single device and DDP" in message


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_needs_whole_gradients_says_so(name: str) -> None:
    for message in run_distributed(refusal, args=(name, "FSDP2Strategy")):
        assert "FSDP2Strategy" in message
        assert "Hint" in message
