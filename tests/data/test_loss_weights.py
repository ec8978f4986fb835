"""Weighted mean losses compose to the mean over the samples of an optimizer step."""

from __future__ import annotations

import random

import pytest
import torch
from harness import assert_accurate
from torch import Tensor

from lightning_ext.data import AdaptiveBatchSampler, Share


def composed(
    ranks: list[AdaptiveBatchSampler], x: Tensor, num_batches: int | None, *, rescale: bool
) -> list[tuple[Tensor, list[list[int]]]]:
    """Each step's gradient as the Trainer composes it, and the samples of each of its batches.

    The gradient of sample i is x[i]: batches count 1/K, ranks 1/W, each mean its weight.
    """
    plan = ranks[0].plan
    drawn = [list(sampler) for sampler in ranks]
    steps: list[tuple[Tensor, list[list[int]]]] = []
    end = plan.num_batches if num_batches is None else min(num_batches, plan.num_batches)
    for batch_idx in range(end):
        accumulate = plan.segment(batch_idx).accumulate
        if batch_idx % accumulate == 0:
            steps.append((torch.zeros_like(x[0]), []))
        gradient, batches = steps[-1]
        batches.append([])
        for rank, sampler in enumerate(ranks):
            share, indices = sampler.share(batch_idx, num_batches), drawn[rank][batch_idx]
            weight = share.loss_weight(rescale_last_window=rescale)
            gradient += weight * x[indices].mean(0) / accumulate / len(ranks)
            batches[-1] += indices[: share.local]
    return steps


def case(seed: int) -> tuple[list[AdaptiveBatchSampler], Tensor, int | None]:
    rng = random.Random(seed)
    num_samples, world, interleave = rng.randint(1, 50), rng.randint(1, 5), rng.random() < 0.5
    ranks = [
        AdaptiveBatchSampler(
            range(num_samples), 1, num_replicas=world, rank=r, interleave=interleave
        )
        for r in range(world)
    ]
    for _ in range(rng.randint(1, 4)):
        sizes, at = (rng.randint(1, 5), rng.randint(1, 4)), rng.randint(0, 12)
        for sampler in ranks:
            sampler.resize(*sizes, not_before=at)
    x = torch.randn(num_samples, 3, dtype=torch.float64)
    return ranks, x, rng.choice([None, rng.randint(1, 12)])


@pytest.mark.parametrize("seed", range(100))
def test_a_step_is_the_mean_over_its_samples(seed: int) -> None:
    ranks, x, num_batches = case(seed)
    for gradient, batches in composed(ranks, x, num_batches, rescale=True):
        indices = [i for batch in batches for i in batch]
        assert_accurate(gradient, x[indices].mean(0))


@pytest.mark.parametrize("seed", range(100))
def test_without_rescaling_a_step_is_what_the_trainer_makes_of_means_over_batches(seed) -> None:
    ranks, x, num_batches = case(seed)
    plan = ranks[0].plan
    first = 0
    for gradient, batches in composed(ranks, x, num_batches, rescale=False):
        means = torch.stack([x[indices].mean(0) for indices in batches])
        assert_accurate(gradient, means.sum(0) / plan.segment(first).accumulate)
        first += len(batches)


@pytest.mark.parametrize("rescale", [True, False])
def test_equal_parts_weigh_exactly_1(rescale: bool) -> None:
    for n, accumulate, world in [(1, 1, 1), (7, 3, 5), (13, 6, 7), (49, 11, 3)]:
        share = Share(n, n * world, n * world * accumulate, accumulate, world)
        assert share.loss_weight(rescale_last_window=rescale) == 1.0


def test_weights_of_a_last_step_by_hand() -> None:
    # 2 ranks, 2 batches of 4 a step planned; left are 5 samples: 4 = 2 + 2, then 1 = 1 + 0.
    ranks = [AdaptiveBatchSampler(range(13), 2, num_replicas=2, rank=r) for r in (0, 1)]
    for sampler in ranks:
        sampler.resize(2, 2)
    shares = [sampler.share(b) for b in (2, 3) for sampler in ranks]
    assert [share[:5] for share in shares] == [
        (2, 4, 5, 2, 2),
        (2, 4, 5, 2, 2),
        (1, 1, 5, 2, 2),
        (0, 1, 5, 2, 2),
    ]
    assert [s.loss_weight() for s in shares] == [8 / 5, 8 / 5, 4 / 5, 0]
    assert [s.loss_weight(rescale_last_window=False) for s in shares] == [1, 1, 2, 0]


def test_a_rank_without_a_sample_repeats_one_with_weight_0() -> None:
    ranks = [AdaptiveBatchSampler(range(5), 2, num_replicas=3, rank=r) for r in range(3)]
    for rank in ranks:
        rank.resize(1)
    assert [list(sampler)[1] for sampler in ranks] == [[3], [4], [3]]
    shares = [sampler.plan.share(1, r) for r, sampler in enumerate(ranks)]
    assert [share.loss_weight() for share in shares] == [1.5, 1.5, 0]
