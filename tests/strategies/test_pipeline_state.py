"""What ranks of a pipeline keep beside the stages, and what they would keep twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import (
    COUNT,
    MICRO,
    Chain,
    by_one,
    by_pipeline,
    data,
    distance,
    loaders,
    pipeline_trainer,
    whole,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import SumMetric


class Normalized(Chain):
    """Has running statistics in its layers, and metrics that it makes after it is split."""

    def __init__(self) -> None:
        super().__init__("sgd")
        for layer in self.net:
            layer[1] = nn.BatchNorm1d(10).double()

    def on_validation_start(self) -> None:
        self.late, self.listed = SumMetric().double(), [{"one": SumMetric().double()}]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)
        self.late.update(loss)
        self.listed[0]["one"].update(loss)

    def on_validation_epoch_end(self) -> None:
        self.log("late", self.late.compute(), sync_dist=True)
        self.log("listed", self.listed[0]["one"].compute(), sync_dist=True)


class Centred(Chain):
    """Reads a buffer before the call that it changes after it."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.register_buffer("centre", torch.zeros(6, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0] - self.centre), batch[1])
        self.centre.lerp_(batch[0].mean(0) + 1, 0.1)
        return loss


class ClippedByRank(Chain):
    """Clips by the norm of what a rank has."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClippedByAll(Chain):
    """Clips by the norm of what all ranks have."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 0.05, "norm")


def _fit(run: Trainer, module: LightningModule, *loaders: Any) -> dict[str, Any]:
    run.fit(module, *loaders)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    return {"weights": whole(module), "state": module.state_dict(), "metrics": metrics}


def _recomputed() -> dict[str, Any]:
    run = pipeline_trainer({"activation_checkpointing": True}, accumulate_grad_batches=1)
    module = Normalized()
    found = _fit(run, module, *loaders())
    return {**found, "state": run.strategy.lightning_module_state_dict()}


def _centred() -> dict[str, Any]:
    return _fit(pipeline_trainer({"num_microbatches": 1}), Centred(), loaders()[0])


def _clipped(module: type[Chain]) -> str:
    with pytest.raises(MisconfigurationException) as found:
        by_pipeline(module("sgd"), {"stages_per_rank": 1})
    return str(found.value)


def _facts() -> dict[str, Any]:
    return {
        "recomputed": _recomputed(),
        "centred": _centred(),
        "clipped": _clipped(ClippedByRank),
        "clipped by all": by_pipeline(ClippedByAll("sgd")),
    }


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return run_distributed(_facts)


@pytest.fixture(scope="module")
def normalized() -> dict[str, Any]:
    run = trainer(max_epochs=2, accumulate_grad_batches=COUNT)
    return _fit(run, Normalized(), DataLoader(data(), MICRO), DataLoader(data(), MICRO * COUNT))


def test_recomputation_leaves_running_statistics_as_one_process_has_them(
    facts: list[dict[str, Any]], normalized: dict[str, Any]
) -> None:
    state = facts[0]["recomputed"]["state"]
    for name, expected in normalized["state"].items():
        torch.testing.assert_close(state[name], expected, rtol=1e-10, atol=1e-12)


def test_metrics_made_when_validation_begins_count_each_sample_once(
    facts: list[dict[str, Any]], normalized: dict[str, Any]
) -> None:
    for rank in facts:
        found = rank["recomputed"]["metrics"]
        for name in ("val_loss", "late", "listed"):
            assert found[name] == pytest.approx(normalized["metrics"][name], rel=1e-10)


def test_a_buffer_changed_after_the_call_is_there_before_it_in_the_next_batch(
    facts: list[dict[str, Any]],
) -> None:
    run = trainer(max_epochs=2)
    expected = _fit(run, Centred(), DataLoader(data(), MICRO * COUNT))
    for rank in facts:
        assert distance(rank["centred"]["weights"], expected["weights"]) < 1e-12
        torch.testing.assert_close(rank["centred"]["state"]["centre"], expected["state"]["centre"])


def test_all_ranks_refuse_copies_that_a_norm_of_one_rank_has_made_different(
    facts: list[dict[str, Any]],
) -> None:
    for rank in facts:
        assert "'first.weight'" in rank["clipped"]
        assert "'head.bias'" in rank["clipped"]
        assert "self.clip_gradients" in rank["clipped"]


def test_the_norm_over_all_ranks_clips_as_one_process_does(facts: list[dict[str, Any]]) -> None:
    expected = by_one(ClippedByAll("sgd"))
    for rank in facts:
        assert distance(rank["clipped by all"].weights, expected.weights) < 1e-10


def _narrow() -> dict[str, Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64)
    options: dict[str, Any] = {"data_parallel_size": 2, "mp_policy": policy, "stages_per_rank": 1}
    return by_pipeline(Chain("sgd"), options).weights


def test_the_first_stage_takes_its_arguments_in_the_dtype_of_mp_policy() -> None:
    expected = by_one(Chain("sgd")).weights
    for found in run_distributed(_narrow, 4):
        assert 1e-12 < distance(found, expected) < 1e-6
