"""Validation, test and predict under a pipeline, against one process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import (
    COUNT,
    Chain,
    Fit,
    by_one,
    by_pipeline,
    data,
    distance,
    loaders,
    pipeline_trainer,
)
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

UNEVEN = 24  # samples of a batch: 64 of them make two and a rest of 16


class Evaluated(Chain):
    """Evaluates in all ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.table = MulticlassConfusionMatrix(3)
        self.several = MetricCollection({"one": MeanMetric(), "other": MulticlassAccuracy(3)})
        self.outputs: list[Tensor] = []
        self.sanity = -1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        scores = self(x)
        self.log("val_loss", F.cross_entropy(scores, y), sync_dist=True)
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy)
        self.table.update(scores, y)
        self.outputs.append(scores.detach())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        scores = torch.cat(self.outputs)
        self.log("spread", scores.std(), sync_dist=True)
        self.log("counted", float(self.table.compute().sum()), sync_dist=True)
        self.table.reset()
        self.outputs.clear()

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Calls the layers again and again, with what they have returned."""
        found = self.first(batch[0])
        for _ in range(3):
            found = self.net(found)
        return self.head(found)


def _evaluate(run: Trainer, module: Evaluated, parts: list[Any]) -> dict[str, Any]:
    """Validates on two loaders, tests on one, and predicts."""
    first, second = (DataLoader(part, UNEVEN) for part in parts)
    validated = run.validate(module, [first, second], verbose=False)
    tested = run.test(module, first, verbose=False)
    predicted = run.predict(module, first)
    return {"validate": validated, "test": tested, "predict": predicted}


def _by_pipeline(options: dict[str, Any]) -> dict[str, Any]:
    replicas = options.get("data_parallel_size", 1)
    replica = int(os.environ["RANK"]) * replicas // int(os.environ["WORLD_SIZE"])
    parts = [data(replicas, replica), data(replicas, replica)]
    return _evaluate(pipeline_trainer(options), Evaluated(), parts)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return _evaluate(trainer(), Evaluated(), [data(), data()])


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_distributed(_by_pipeline, args=({},))


@pytest.mark.parametrize("what", ["validate", "test"])
def test_metrics_are_those_of_one_process_on_all_ranks(
    what: str, one: dict[str, Any], found: list[dict[str, Any]]
) -> None:
    for rank in found:
        for own, expected in zip(rank[what], one[what], strict=True):
            assert own == pytest.approx(expected, rel=1e-12)


def test_predictions_are_those_of_one_process_on_all_ranks(
    one: dict[str, Any], found: list[dict[str, Any]]
) -> None:
    for rank in found:
        for own, expected in zip(rank["predict"], one["predict"], strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 5])
def test_a_call_that_is_cut_returns_what_the_whole_one_returns(
    parts: int, one: dict[str, Any]
) -> None:
    for rank in run_distributed(_by_pipeline, args=({"num_eval_microbatches": parts},)):
        assert rank["validate"][0] == pytest.approx(one["validate"][0], rel=1e-12)
        torch.testing.assert_close(
            torch.cat(rank["predict"]), torch.cat(one["predict"]), rtol=1e-12, atol=1e-12
        )


def test_replicas_count_every_sample_once(one: dict[str, Any]) -> None:
    expected = one["test"][0]
    for rank in run_distributed(_by_pipeline, 4, args=({"data_parallel_size": 2},)):
        assert rank["test"][0]["counted"] == expected["counted"] == len(data())
        assert rank["test"][0]["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-12)


def _fitted() -> Fit:
    kwargs: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 2}
    return by_pipeline(Evaluated(), num_sanity_val_steps=2, **kwargs)


def test_validation_within_an_epoch_is_that_of_one_process() -> None:
    kwargs: dict[str, Any] = {"val_check_interval": 2 * COUNT, "limit_val_batches": 2}
    expected = by_one(Evaluated(), num_sanity_val_steps=2, **kwargs)
    for weights, metrics in run_distributed(_fitted):
        assert metrics == pytest.approx(expected.metrics, rel=1e-10)
        assert distance(weights, expected.weights) < 1e-12


class Total(nn.Module):
    """Joins samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def _not_joined() -> str:
    module = Evaluated()
    module.net.append(Total())
    run = pipeline_trainer({"num_eval_microbatches": 2})
    with pytest.raises(MisconfigurationException) as error:
        run.validate(module, loaders()[1])
    return str(error.value)


def test_outputs_that_cannot_be_joined_are_refused_on_all_ranks() -> None:
    assert all("num_eval_microbatches=1" in text for text in run_distributed(_not_joined))


class Normed(Chain):
    """Normalizes before, within and after the layers, and keeps things of its own."""

    def __init__(self) -> None:
        super().__init__("sgd")  # the gradient of a bias before a norm is noise
        self.before, self.after = nn.BatchNorm1d(10), nn.BatchNorm1d(10)
        for index in range(5):
            self.net[index].insert(1, nn.BatchNorm1d(10))
        self.register_buffer("batches", torch.zeros(1))
        self.seen: list[int] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes."""
        return self.head(self.after(self.net(self.before(self.first(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        loss = super().training_step(batch, batch_idx)
        self.batches = self.batches + 1
        self.seen.append(-1)
        return loss


def _normed(options: dict[str, Any], validates: bool) -> tuple[dict[str, Tensor], list[int], Any]:
    module = Normed()
    kwargs = {} if validates else {"limit_val_batches": 0}
    run = pipeline_trainer(options, accumulate_grad_batches=1, **kwargs)
    run.fit(module, *loaders())
    held = dict(module.named_buffers())
    if not validates:
        saved = run.strategy.lightning_module_state_dict()
        held = {name: saved[name] for name, _ in Normed().named_buffers() if name in saved}
    return held, module.seen, {k: float(v) for k, v in run.callback_metrics.items()}


@pytest.fixture(scope="module")
def normed() -> tuple[dict[str, Tensor], list[int], dict[str, float]]:
    module = Normed()
    metrics = by_one(module).metrics
    return dict(module.named_buffers()), module.seen, metrics


@pytest.mark.parametrize(
    ("world", "options"),
    [(2, {"schedule": "breadth_first"}), (2, {"schedule": "1f1b"}), (1, {"stages_per_rank": 4})],
)
def test_buffers_are_those_of_one_process(world: int, options: dict[str, Any], normed: Any) -> None:
    expected, seen, metrics = normed
    found = run_distributed(_normed, world, args=(options, True))
    for held, _, logged in found:
        torch.testing.assert_close(held, {n: expected[n] for n in held}, rtol=1e-12, atol=1e-12)
        assert logged == pytest.approx(metrics, rel=1e-10)
    assert {name for held, _, _ in found for name in held} == set(expected)
    assert found[-1][1].count(-1) == seen.count(-1)
    assert len(found[-1][1]) == len(seen)


def test_a_checkpoint_has_the_buffers_of_the_rank_that_changed_them(normed: Any) -> None:
    held, _, _ = run_distributed(_normed, args=({}, False))[0]
    torch.testing.assert_close(held, normed[0], rtol=1e-12, atol=1e-12)


class Inferred(Chain):
    """Evaluates in inference mode, as Lightning does on other backends than gloo."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), *self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        with torch.inference_mode():
            loss = float(F.cross_entropy(self(x), y))
        self.log("val_loss", loss, sync_dist=True)


def _inferred() -> Fit:
    options = {"data_parallel_size": 2, "stages_per_rank": 2}
    return by_pipeline(Inferred(), options, num_sanity_val_steps=1)


def test_training_goes_on_after_inference_mode() -> None:
    expected = by_one(Inferred(), num_sanity_val_steps=1)
    for weights, metrics in run_distributed(_inferred):
        assert distance(weights, expected.weights) < 1e-12
        assert metrics == pytest.approx(expected.metrics, rel=1e-10)
