"""DeepSpeed with quantized weights on one GPU; its quantizer is compiled there, by nvcc."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Classifier, run_distributed
from harness.deepspeed_parts import KNOWN_WARNINGS, deepspeed, trained
from torch.utils.cpp_extension import CUDA_HOME

pytestmark = [
    *KNOWN_WARNINGS,
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA_HOME is None, reason="DeepSpeed compiles its quantizer with nvcc"),
]


def quantized() -> dict[str, Any]:
    module = Classifier("adamw", dropout=0.0)
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "max_epochs": 4}
    weights, run = trained(deepspeed(), 1, module=module, **options)
    config = run.strategy.config["zero_optimization"]
    first, last = module.losses[:24], module.losses[-24:]
    return {
        "settings": {k: v for k, v in config.items() if k.startswith("zero_")},
        "losses": (sum(first) / 24, sum(last) / 24),
        "dtypes": {x.dtype for x in weights.values()},
        "finite": all(bool(torch.isfinite(x).all()) for x in weights.values()),
    }


def test_one_rank_trains_with_quantized_weights() -> None:
    pytest.importorskip("deepspeed")
    (found,) = run_distributed(quantized, 1, start_method="spawn", timeout=300)
    assert found["settings"]["zero_quantized_weights"]
    assert found["settings"]["zero_quantized_gradients"]
    assert found["settings"]["zero_hpz_partition_size"] == 1
    assert found["dtypes"] == {torch.float32}
    assert found["finite"]
    assert found["losses"][1] < found["losses"][0]


def round_trip() -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """What DeepSpeed gathers of weights, and they; one rank gathers from nobody."""
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    weights = torch.randn(64 * 1024, device="cuda", dtype=torch.float16)
    quantizer = CUDAQuantizer()
    codes, scales = quantizer.quantize(weights)
    found = quantizer.dequantize(codes, scales)
    return weights.float().cpu(), found.float().cpu(), codes.dtype


def test_its_quantizer_is_off_by_one_step_at_most() -> None:
    pytest.importorskip("deepspeed")
    ((weights, found, dtype),) = run_distributed(round_trip, 1, start_method="spawn", timeout=300)
    assert dtype == torch.int8
    assert (found - weights).abs().max() <= weights.abs().max() / 127
