"""A run that adapts its batch meets a batch that does not fit, and ends where it would have."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import Classifier, assert_accurate, fit, loader
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_ext._lightning import recover_from_oom, runs_in_parts, steps_now
from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale

pytestmark = pytest.mark.filterwarnings("ignore:A micro-batch of .* ran out of memory:UserWarning")


def fail(gradient: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


class Limited(Classifier):
    """Has room for so many samples, from a batch of the run on."""

    def __init__(
        self, limit: int = 1000, where: str = "forward", since: int = 0, optimizer: str = "sgd"
    ) -> None:
        super().__init__(optimizer, dropout=0.0)
        self.double()
        self.limit, self.where, self.since = limit, where, since
        self.sizes: list[int] = []
        self.failures = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        self.sizes.append(len(x))
        hidden = self.net[:3](x)
        if len(x) > self.limit and self.trainer.fit_loop.total_batch_idx >= self.since:
            self.failures += 1
            if self.where == "forward":
                fail(hidden)
            hidden.register_hook(fail)  # the last layer has its gradient by then
        return nn.functional.cross_entropy(self.net[3](hidden), y)


class Recover(Callback):
    """Recovers without a word to the callback that set the sizes."""

    def __init__(self, adaptive: AdaptiveBatchSize | None = None) -> None:
        self.adaptive = adaptive

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.handle = recover_from_oom(
            trainer,
            on_split=lambda ceiling: None,
            on_rerun=self.adaptive and partial(self.adaptive._read_share, trainer),
        )

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.handle.detach()


def data(num_samples: int = 96) -> Any:
    return loader(num_samples, 4, dtype=torch.float64)


def assert_same_weights(module: nn.Module, other: nn.Module) -> None:
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert_accurate(found, expected.detach())


def assert_as_with_room(rule: str, tight: Limited, accumulate: int, *, lowers: bool) -> None:
    settings = {"train": data(), "accumulate_grad_batches": accumulate}
    one = AdaptiveBatchSize(rule, max_micro_batch=16, on_oom="raise")
    roomy, expected = fit([one], module=Limited(optimizer=tight.chosen), **settings)
    other = AdaptiveBatchSize(rule, max_micro_batch=16, on_oom="split" if lowers else "raise")
    recover = [] if lowers else [Recover(other)]
    _, found = fit([other, *recover], module=tight, **settings)
    assert tight.failures > 0
    assert found.global_step == expected.global_step
    assert other.global_batch == one.global_batch
    assert other.samples_seen == one.samples_seen == 192
    assert_same_weights(tight, roomy)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_schedule_that_outgrows_memory_takes_the_same_steps(
    where: str, accumulate: int, optimizer: str
) -> None:
    first = 4 * accumulate
    rule = f"0:{first} {2 * first}:{2 * first} {6 * first}:{4 * first}"
    tight = Limited(5, where, optimizer=optimizer)
    assert_as_with_room(rule, tight, accumulate, lowers=False)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_so_does_one_whose_micro_batch_is_lowered(where: str, accumulate: int) -> None:
    rule = f"0:{4 * accumulate} {8 * accumulate}:{16 * accumulate}"
    assert_as_with_room(rule, Limited(5, where), accumulate, lowers=True)


def test_later_windows_have_micro_batches_that_fit() -> None:
    module = Limited(5)
    adaptive = AdaptiveBatchSize("0:8 16:32", max_micro_batch=16)
    fit([adaptive], module=module, train=data())
    assert adaptive.batch.in_force == (4, 8)
    assert set(module.sizes[-24:]) == {4}
    assert module.failures == 2  # 16, then 8


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("since", [3, 4, 5])
def test_a_repeated_batch_keeps_its_weight_in_a_cut_window(where: str, since: int) -> None:
    # Windows of 12 and 11 samples: the weights of 4, 4 and 3 samples differ.
    settings = {"train": data(23), "accumulate_grad_batches": 3}
    roomy, _ = fit([AdaptiveBatchSize("0:12")], module=Limited(), **settings)
    tight, _ = fit([AdaptiveBatchSize("0:12")], module=Limited(2, where, since), **settings)
    assert tight.failures > 0
    assert_same_weights(tight, roomy)


class Watch(Callback):
    """Notes for each step whether it ran in parts and whether the noise scale was measured."""

    def __init__(self, noise: GradientNoiseScale) -> None:
        self.noise = noise
        self.steps: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if steps_now(trainer):
            self.steps.append((runs_in_parts(trainer), self.noise.measured))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_noise_scale_leaves_out_steps_that_ran_in_parts_and_goes_on(where: str) -> None:
    noise = GradientNoiseScale(1)
    watch = Watch(noise)
    adaptive = AdaptiveBatchSize(
        "noise_scale", max_global_batch=64, max_micro_batch=16, dwell_samples=10**9
    )
    module = Limited(2, where, since=5)
    fit([noise, adaptive, watch], module=module, train=data())
    assert {parts != measured for parts, measured in watch.steps} == {True}
    assert 0 < sum(parts for parts, _ in watch.steps) < 6
    assert adaptive.batch.in_force == (2, 4)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_the_noise_scale_measures_is_that_of_the_other_steps(where: str) -> None:
    class Once(Limited):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.failures:
                self.limit, recover.handle.ceiling = 1000, None

    whole, parts, recover = GradientNoiseScale(1), GradientNoiseScale(1), Recover()
    settings = {"train": data(), "accumulate_grad_batches": 3, "max_epochs": 1}
    fit([whole], module=Limited(), **settings)
    fit([parts, recover], module=Once(2, where, since=4), **settings)
    rows, rest = (noise.state_dict()["history"] for noise in (whole, parts))
    assert_accurate(rest, torch.cat([rows[:1], rows[2:]]))


def two_rows_each(samples: list[Any]) -> Any:
    return [torch.stack(column).repeat_interleave(2, 0) for column in zip(*samples, strict=True)]


def test_rows_that_are_no_samples_of_the_sampler_are_not_cut() -> None:
    train = loader(96, 4, dtype=torch.float64, collate_fn=two_rows_each)
    with pytest.raises(torch.OutOfMemoryError, match="drew 4 samples and the batch has 8 rows"):
        fit([AdaptiveBatchSize("0:8")], module=Limited(5), train=train)


def test_recovery_may_be_left_out() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit([AdaptiveBatchSize("0:8", on_oom="raise")], module=Limited(3), train=data())
