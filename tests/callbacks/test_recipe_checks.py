"""Advice on parameters, loss, normalization and the order of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import dataset, loader, run_distributed
from harness._recipes import decayed, look, the_advice, topics
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_ext.callbacks import AdaptiveBatchSize


def split_decay(params: Any) -> Any:
    every = list(params)
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in every if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def test_biases_and_norms_should_not_decay() -> None:
    advice = the_advice(look(nn.LayerNorm(12), optimizer=decayed))
    assert advice.topic == "weight decay"
    assert "4 parameters of one dimension (net.0.bias, net.3.bias, …)" in advice.found
    assert topics(look(nn.LayerNorm(12), optimizer=split_decay)) == {}


@pytest.mark.parametrize(
    ("samples", "severity", "found"),
    [
        (101, "advice", "has 1 of 4 samples, each of which weighs 4 times"),
        (103, "note", "has 3 of 4 samples, each of which weighs 1.33 times"),
        (100, "advice", "has 1 of 2 micro-batches, its gradient is 0.5 of a mean"),
    ],
)
def test_a_last_sample_that_weighs_more_is_told(samples: int, severity: str, found: str) -> None:
    advice = the_advice(look(train=loader(samples)))
    assert (advice.topic, advice.severity) == ("loss average", severity)
    assert found in advice.found


@pytest.mark.parametrize(
    "settings",
    [
        {"train": loader(99, drop_last=True)},
        {"train": loader(99), "limit_train_batches": 10},
        {"train": loader(99), "beside": [AdaptiveBatchSize("0:8")]},
    ],
    ids=["dropped", "not reached", "weighed"],
)
def test_an_even_loss_is_left_alone(settings: dict[str, Any]) -> None:
    assert topics(look(**settings)) == {}


def test_losses_that_are_only_weighed_within_a_batch_are_told() -> None:
    as_the_trainer = AdaptiveBatchSize("0:8", rescale_last_window=False)
    assert "loss average" in topics(look(beside=[as_the_trainer], train=loader(97)))


def test_a_summed_loss_is_a_warning() -> None:
    advice = the_advice(look(nn.MSELoss(reduction="sum"), nn.MSELoss()))
    assert (advice.topic, advice.severity) == ("loss average", "warning")
    assert "extra.0:" in advice.found


@pytest.mark.parametrize(("micro_batch", "wanted"), [(8, "larger"), (16, None), (256, "smaller")])
def test_batch_normalization_wants_16_to_128_samples(micro_batch: int, wanted: str | None) -> None:
    recipe = look(nn.BatchNorm1d(12), train=loader(2 * micro_batch, micro_batch))
    if wanted is None:
        assert topics(recipe) == {}
    else:
        assert f"over {micro_batch} samples" in the_advice(recipe).found
        assert f"a {wanted} micro-batch" in the_advice(recipe).recommended


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_frozen_batch_normalization_is_left_alone() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    assert topics(look(Frozen(12).eval())) == {}


@pytest.mark.filterwarnings("ignore:The micro-batch may change")
def test_a_changing_micro_batch_under_batch_normalization_is_a_warning() -> None:
    changing = AdaptiveBatchSize("0:32", max_micro_batch=32)
    recipe = look(nn.BatchNorm1d(12), beside=[changing], train=loader(128, 16))
    assert topics(recipe)["batch normalization"] == "warning"


@pytest.mark.parametrize("shuffle", [True, False])
def test_samples_are_to_be_shuffled(shuffle: bool) -> None:
    wanted = {} if shuffle else {"order of samples": "advice"}
    assert topics(look(train=loader(shuffle=shuffle))) == wanted


def test_drawing_with_replacement_is_a_note() -> None:
    data = dataset()
    twice = DataLoader(data, batch_size=4, sampler=RandomSampler(data, replacement=True))
    assert topics(look(train=twice)) == {"order of samples": "note"}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        data: Any = dataset(16)
        return iter([tuple(t[None] for t in data[i]) for i in range(16)])


def test_a_stream_without_a_batch_size_is_measured_by_its_batches() -> None:
    recipe = look(train=DataLoader(Stream(), batch_size=None), max_steps=2)
    assert recipe._began_with == 2
    assert recipe.advice == []


class Block(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.conv2, self.bn2 = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)
        self.downsample = None
        nn.init.constant_(self.bn2.weight, gamma)


def test_the_last_gamma_of_a_residual_branch_begins_at_0() -> None:
    train = loader(64, 16)
    advice = the_advice(look(Block(1.0), Block(0.0), train=train))
    assert (advice.topic, advice.severity) == ("initialization", "note")
    assert "1 residual branches (extra.0)" in advice.found
    assert topics(look(Block(0.0), train=train)) == {}


class Sync(Callback):
    """Puts a layer in that DDP would refuse on a CPU."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.extra[0] = nn.SyncBatchNorm(12)


def on_two_ranks(micro_batch: int, distributed_sampler: bool, synced: bool) -> Any:
    recipe = look(
        nn.BatchNorm1d(12),
        beside=[Sync()] if synced else [],
        train=loader(256, micro_batch),
        strategy="ddp_find_unused_parameters_true",  # the extra layers
        devices=2,
        use_distributed_sampler=distributed_sampler,
    )
    return [(a.topic, a.severity, a.found) for a in recipe.advice]


@pytest.mark.parametrize(
    ("micro_batch", "distributed_sampler", "synced", "wanted"),
    [
        (8, True, False, [("batch normalization", "advice")]),
        (8, True, True, []),
        (128, True, True, [("batch normalization", "advice"), ("loss average", "advice")]),
        (64, False, False, [("order of samples", "warning")]),
    ],
    ids=["small", "small, synced", "large, synced", "every rank for itself"],
)
def test_two_ranks(
    micro_batch: int, distributed_sampler: bool, synced: bool, wanted: list[tuple[str, str]]
) -> None:
    one, other = run_distributed(on_two_ranks, args=(micro_batch, distributed_sampler, synced))
    assert one == other
    assert sorted((topic, severity) for topic, severity, _ in one) == wanted
