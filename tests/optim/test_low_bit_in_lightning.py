"""States of few bits in a Trainer, under a batch that changes, and inside of wrappers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, fit, same_weights
from harness.optimizer_cases import CASES
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import Parameter, ParameterList
from torch.optim import Optimizer

from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.functional import QuantizedState
from lightning_ext.optim import LAMB, LAWN, VRGD, LowBitAdamW, base_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:The global batch may change, and with interval")
FORMATS = ["bfloat16", "int8", "int4", "fp8"]


class Module(Classifier):
    """Matrices in few bits, biases in float32."""

    def __init__(self, format: str) -> None:
        super().__init__(dropout=0.0)
        self.format = format

    def configure_optimizers(self) -> Any:
        how: dict[str, Any] = {"state_dtype": self.format, "min_quantized_numel": 0}
        return LowBitAdamW(self.parameters(), lr=1e-2, **how)


def growing() -> AdaptiveBatchSize:
    return AdaptiveBatchSize("0:8 30:16 70:32 150:8", max_micro_batch=8)


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_resumes_within_an_epoch_and_a_batch_that_has_grown(
    format: str, tmp_path: Path
) -> None:
    def train(**how: Any) -> Any:
        saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
        return fit([growing(), saves], module=Module(format), enable_checkpointing=True, **how)

    whole, _ = train()
    path = tmp_path / "step=5.ckpt"  # 56 samples are seen, of 96, and 16 are in a batch
    assert torch.load(path, weights_only=True)["optimizer_states"]
    resumed, run = train(ckpt_path=str(path))
    assert 0 < len(resumed.seen) < len(whole.seen)
    assert same_weights(whole, resumed)
    states = run.optimizers[0].state.values()
    assert sum(isinstance(x["exp_avg"], QuantizedState) for x in states) == 2


def test_training_in_8_bits_ends_near_training_in_32() -> None:
    losses = [sum(fit(module=Module(x), max_epochs=6)[0].losses[-24:]) for x in ("float32", "int8")]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def _wrapped(kind: str) -> tuple[ParameterList, Optimizer]:
    draw = torch.Generator().manual_seed(0)
    params = ParameterList([Parameter(torch.randn(80, 60, generator=draw)) for _ in range(2)])
    groups = [{"params": list(params), "trust_ratio": True}]
    base = LAMB(groups, lr=0.01, state_dtype="int8")
    return params, LAWN(base, free_steps=1) if kind == "LAWN" else VRGD(base)


def _run(kind: str, params: ParameterList, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        grads = [torch.randn(80, 60, generator=draw) for _ in params]
        optimizer.zero_grad()
        CASES[kind].give(list(params), grads)
        optimizer.step()


@pytest.mark.parametrize("kind", ["LAWN", "VRGD"])
def test_a_wrapper_saves_and_loads_what_is_inside(kind: str) -> None:
    params, first = _wrapped(kind)
    _run(kind, params, first, range(3))
    again, second = _wrapped(kind)
    again.load_state_dict(copy.deepcopy(params.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    state = base_optimizer(second).state[again[0]]
    assert isinstance(state["exp_avg"], QuantizedState)
    _run(kind, params, first, range(3, 5))
    _run(kind, again, second, range(3, 5))
    assert all(map(torch.equal, params, again))
