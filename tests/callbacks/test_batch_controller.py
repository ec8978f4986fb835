"""Limits and hysteresis around a rule, in numbers alone."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest

from lightning_ext.callbacks import AdaptiveBatchSize
from lightning_ext.scaling import BatchSplit, NoiseScale, NoiseScaleRule, Observation


def bound(rule: Any = "noise_scale", limit: int = 4096, ranks: int = 1, **kwargs: Any) -> Any:
    start = kwargs.pop("start", BatchSplit(8, 4))
    controller = AdaptiveBatchSize(rule, max_global_batch=limit, **kwargs).batch.controller
    controller.bind(start, ranks)
    return controller


def noise(value: float) -> NoiseScale:
    return NoiseScale(value, value, value, 1.0, value, 1)


def decided(controller: Any, batch: int, value: float) -> int:
    decision = controller.decide(Observation(batch, 0, noise(value)))
    assert decision is not None
    return decision.global_batch


@pytest.mark.parametrize(
    ("value", "batch"),
    [(33, 32), (38, 32), (40, 40), (50, 50), (64, 64), (500, 64), (10, 32)],
)
def test_threshold_growth_and_monotone(value: float, batch: int) -> None:
    assert decided(bound(), 32, value) == batch


def test_what_is_not_monotone_shrinks_no_faster_than_it_grows() -> None:
    assert decided(bound(monotone=False), 32, 10) == 16


def test_the_limit_holds() -> None:
    assert decided(bound(limit=40), 32, 500) == 40


def test_a_schedule_is_followed_to_the_letter() -> None:
    with pytest.warns(UserWarning, match="goes up to 400, max_global_batch=300"):
        controller = bound("0:32 10:33 20:400 30:8", limit=300)
    found = [controller.decide(Observation(32, seen)).global_batch for seen in (0, 10, 20, 30)]
    assert found == [32, 33, 300, 8]


def test_dwell_is_16_steps_unless_it_is_given() -> None:
    assert bound().dwells(32, 16 * 32 - 1)
    assert not bound().dwells(32, 16 * 32)
    assert not bound(dwell_samples=0).dwells(32, 0)
    assert not bound("0:32").dwells(32, 0)


@pytest.mark.parametrize(
    ("batch", "split"),
    [(64, (16, 4)), (128, (32, 4)), (129, (32, 4)), (192, (24, 8)), (256, (32, 8))],
)
def test_the_micro_batch_grows_first_then_accumulation(batch: int, split: tuple[int, int]) -> None:
    assert bound(max_micro_batch=32).split(batch) == split


@pytest.mark.parametrize(("batch", "split"), [(32, (8, 4)), (63, (8, 4)), (64, (8, 8))])
def test_a_fixed_micro_batch_grows_in_multiples_of_the_start(
    batch: int, split: tuple[int, int]
) -> None:
    assert bound().split(batch) == split


@pytest.mark.parametrize(
    ("batch", "split"), [(32, (8, 4)), (40, (8, 5)), (8, (8, 1)), (4, (4, 1)), (96, (8, 12))]
)
def test_a_schedule_with_a_fixed_micro_batch_is_exact_where_it_can_be(
    batch: int, split: tuple[int, int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bound("0:32").split(batch) == split


def test_ranks_and_accumulation_are_interchangeable() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        passes, ranks = rng.choice([1, 2, 3]), rng.choice([2, 3, 4])
        largest = rng.choice([None, 8, 20, 64])
        settings = {"max_micro_batch": largest, "limit": 10**6}
        together = bound(ranks=ranks, start=BatchSplit(8, passes), **settings)
        alone = bound(start=BatchSplit(8, passes * ranks), **settings)
        batch = rng.randint(8 * passes * ranks, 5000)
        one, other = together.split(batch), alone.split(batch)
        assert one.micro_batch == other.micro_batch
        assert one.accumulate * ranks == other.accumulate


def test_no_opinion_is_no_decision() -> None:
    assert bound().decide(Observation(32, 0, None)) is None


def test_a_rule_may_be_any_object_with_the_two_members() -> None:
    class Always:
        needs = frozenset({"noise"})

        def propose(self, observation: Observation) -> Any:
            return NoiseScaleRule(factor=2.0).propose(observation)

    controller = bound(Always())
    assert decided(controller, 32, 30) == 60
