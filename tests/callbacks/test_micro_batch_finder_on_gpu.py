"""The finder on a CUDA device: in this process, under the caching allocator's limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader, same_weights
from torch import Tensor

from lightning_ext.callbacks import MicroBatchFinder

pytestmark = pytest.mark.gpu
MIB = 2**20
ON_GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "max_epochs": 1}


class Hungry(Classifier):
    """Takes 16 MiB per sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        activations = torch.ones(len(batch[0]), 4 * MIB, device=self.device)
        return super().training_step(batch, batch_idx) + 0 * activations[0, 0]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_it_finds_what_memory_allows_and_changes_nothing(precision: str) -> None:
    torch.cuda.init()
    limit = torch.cuda.memory_reserved() + 1024 * MIB
    finder = MicroBatchFinder(max_memory_bytes=limit)
    with_it, _ = fit([finder], module=Hungry(), precision=precision, **ON_GPU)
    assert finder.micro_batch is not None
    assert 0.9 * 64 <= finder.micro_batch <= 64
    largest = max(trial.peak_bytes for trial in finder.trials if trial.fits)
    assert largest == pytest.approx(finder.micro_batch * 16 * MIB, rel=0.05)
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    without, _ = fit([], module=Hungry(), precision=precision, **ON_GPU)
    assert same_weights(with_it, without)
    assert with_it.losses == without.losses


def test_by_default_it_leaves_a_tenth_of_the_device() -> None:
    finder = MicroBatchFinder(max_micro_batch=8)
    fit([finder], module=Classifier(), train=loader(16), **ON_GPU)
    assert finder.micro_batch == 8
