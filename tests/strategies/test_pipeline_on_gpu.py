"""All stages of a pipeline on one GPU; between GPUs nothing is tested."""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_distributed
from harness.pipeline_parts import by_one, by_pipeline, distance
from torch import Tensor

pytestmark = pytest.mark.gpu

ON_GPU: dict[str, Any] = {"accelerator": "gpu", "gradient_clip_val": 0.1}


def fitted(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    found = by_pipeline(None, {"stages_per_rank": "layers", **options}, 2, **ON_GPU)
    return {name: x.cpu() for name, x in found.weights.items()}, found.metrics


def alone() -> tuple[dict[str, Tensor], dict[str, float]]:
    found = by_one(None, 2, **ON_GPU)
    return {name: x.cpu() for name, x in found.weights.items()}, found.metrics


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "interleaved_1f1b"},
        {"schedule": "gpipe", "stages_per_rank": 1},
        {"schedule": "1f1b", "stages_per_rank": 1},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_one_rank_with_all_stages_is_one_process(options: dict[str, Any]) -> None:
    ((weights, metrics),) = run_distributed(fitted, 1, start_method="spawn", args=(options,))
    ((truth, expected),) = run_distributed(alone, 1, start_method="spawn")
    assert distance(weights, truth) <= 1e-10
    assert metrics == pytest.approx(expected, rel=1e-10)
