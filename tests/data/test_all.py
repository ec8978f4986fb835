"""The contract of the room: each sample once per epoch, same order on resume, disjoint ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from torch.utils.data import RandomSampler

from lightning_ext import data
from lightning_ext.data import AdaptiveBatchSampler, EpochPlan, SeededPermutation, Share

NUM_SAMPLES = 41
Parts = list[list[int]]


def _sampler(world: int, rank: int) -> AdaptiveBatchSampler:
    order = RandomSampler(range(NUM_SAMPLES))
    return AdaptiveBatchSampler(order, 2, seed=5, num_replicas=world, rank=rank)


def _drawn(world: int, rank: int, start: int) -> Parts:
    """Batches of one rank from `start` on, in a run that was interrupted there."""
    sampler = _sampler(world, rank)
    sampler.resize(3, 2, not_before=4)
    parts = iter(sampler)
    for _ in range(start):
        next(parts)
    resumed = _sampler(world, rank)
    resumed.load_state_dict(pickle.loads(pickle.dumps(sampler.state_dict())))
    own = [resumed.share(b).local for b in range(start, len(resumed))]
    return [part[:n] for part, n in zip(resumed, own, strict=True)]


def _planned(world: int, rank: int, start: int) -> Parts:
    plan = _sampler(world, 0).plan.resized(4, 3, 2)
    return [list(range(*plan.local_span(b, rank))) for b in range(start, plan.num_batches)]


def _permuted(world: int, rank: int, start: int) -> Parts:
    order = SeededPermutation(NUM_SAMPLES, seed=5)
    return [[index] for index in order][start:]


def _counted(world: int, rank: int, start: int) -> Parts:
    """A share counts samples; here one number stands for each of them."""
    plan = _sampler(world, 0).plan
    shares = [[plan.share(b, r) for r in range(world)] for b in range(plan.num_batches)]
    assert all(sum(s.local for s in ranks) == ranks[0].across_ranks for ranks in shares)
    before = [sum(s.local for s in ranks[:rank]) for ranks in shares]
    begins = [sum(ranks[0].across_ranks for ranks in shares[:b]) for b in range(len(shares))]
    return [
        list(range(begins[b] + before[b], begins[b] + before[b] + shares[b][rank].local))
        for b in range(start, len(shares))
    ]


CONTRACTS: dict[str, Callable[[int, int, int], Parts]] = {
    "AdaptiveBatchSampler": _drawn,
    "EpochPlan": _planned,
    "SeededPermutation": _permuted,
    "Share": _counted,
}
WITHOUT_RANKS = {"SeededPermutation": "every rank draws the whole order"}

members = pytest.mark.parametrize("name", data.__all__)


def test_every_public_name_has_a_contract() -> None:
    assert data.__all__ == sorted(CONTRACTS)


@members
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_exactly_once_per_epoch(name: str, world: int) -> None:
    ranks = range(1 if name in WITHOUT_RANKS else world)
    parts = [part for rank in ranks for part in CONTRACTS[name](world, rank, 0)]
    assert sorted(index for part in parts for index in part) == list(range(NUM_SAMPLES))


@members
@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_the_same_order_on_resume(name: str, start: int) -> None:
    run = CONTRACTS[name]
    assert run(2, 1, start) == run(2, 1, 0)[start:]


@pytest.mark.parametrize("name", [name for name in data.__all__ if name not in WITHOUT_RANKS])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_are_disjoint(name: str, world: int) -> None:
    seen = [{i for part in CONTRACTS[name](world, r, 0) for i in part} for r in range(world)]
    assert sum(map(len, seen)) == len(set.union(*seen))


@pytest.mark.parametrize(
    "member",
    [
        _sampler(2, 1),
        _sampler(2, 1).plan,
        SeededPermutation(7, seed=1),
        Share(1, 2, 4, 2, 2),
    ],
    ids=lambda member: type(member).__name__,
)
def test_it_survives_pickling(member: object) -> None:
    copy = pickle.loads(pickle.dumps(member))
    if isinstance(member, (EpochPlan, Share)):
        assert copy == member
    else:
        assert list(copy) == list(member)
