"""The three callbacks on a CUDA device, with and without a gradient scaler."""

from __future__ import annotations

import math

import pytest
from harness import fit, loader, same_weights

from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale

pytestmark = pytest.mark.gpu
ON_GPU = {"accelerator": "gpu", "devices": 1}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_all_three_train(precision: str) -> None:
    noise, average = GradientNoiseScale(1, per_group=True), EMA(0.9)
    adaptive = AdaptiveBatchSize("0:8 40:16 100:32", max_micro_batch=8)
    _, run = fit([adaptive, noise, average], precision=precision, **ON_GPU)
    assert adaptive.samples_seen == 192
    assert adaptive.global_batch == 32
    assert 0 < average.updates <= run.global_step  # a scaler may skip its first steps
    assert math.isfinite(noise.estimate().grad_trace)
    assert average._average is not None
    assert all(t.is_cuda for t in average._average._tensors.values())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_neutral_is_bitwise_the_run_without_it(precision: str) -> None:
    neutral = [AdaptiveBatchSize("0:8", rescale_last_window=False), GradientNoiseScale(1), EMA()]
    with_ours, _ = fit(neutral, train=loader(50), precision=precision, **ON_GPU)
    without, _ = fit([], train=loader(50), precision=precision, **ON_GPU)
    assert same_weights(with_ours, without)
