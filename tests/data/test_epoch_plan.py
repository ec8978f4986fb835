"""The layout of an epoch against one that is laid out batch by batch."""

from __future__ import annotations

import math
import random

import pytest

from lightning_ext.data import AdaptiveBatchSampler, EpochPlan


def plan_of(
    num_samples: int, world: int, *segments: tuple[int, int, int], drop_last: bool = False
) -> EpochPlan:
    plan = AdaptiveBatchSampler(range(num_samples), 1, drop_last, num_replicas=world).plan
    for segment in segments:
        plan = plan.resized(*segment)
    return plan


def laid_out(plan: EpochPlan) -> list[tuple[int, int]]:
    """Spans of the batches from `first_batch` on, counted without arithmetic."""
    spans: list[tuple[int, int]] = []
    position = plan.first_sample
    while position < plan.num_samples:
        batch_idx = plan.first_batch + len(spans)
        sizes = [s.micro_batch for s in plan.segments if s.start <= batch_idx][-1]
        end = position + sizes * plan.data_parallel_size
        if plan.drop_last and end > plan.num_samples:
            break
        spans.append((position, min(end, plan.num_samples)))
        position = end
    return spans


def assert_consistent(plan: EpochPlan) -> None:
    spans = laid_out(plan)
    assert plan.num_batches == plan.first_batch + len(spans)
    assert [plan.span(b) for b in range(plan.first_batch, plan.num_batches)] == spans


def assert_windows_whole(plan: EpochPlan) -> None:
    """Walk as the Trainer does: zero at b % K == 0, step at (b + 1) % K == 0 and at the end."""
    gathered: list[int] = []
    for batch_idx in range(plan.num_batches):
        accumulate = plan.segment(batch_idx).accumulate
        if batch_idx % accumulate == 0:
            assert not gathered
        gathered.append(batch_idx)
        if (batch_idx + 1) % accumulate == 0 or batch_idx + 1 == plan.num_batches:
            assert len({plan.segment(b)[1:] for b in gathered}) == 1
            assert {plan.window(b) for b in gathered} == {(gathered[0], batch_idx + 1)}
            gathered = []
    assert not gathered


def random_epoch(rng: random.Random) -> None:
    num_samples, world = rng.randint(0, 60), rng.randint(1, 4)
    drop_last, interleave = rng.random() < 0.3, rng.random() < 0.5
    change = rng.choice([0.1, 0.5, 1.0])
    ranks = [
        AdaptiveBatchSampler(
            range(num_samples), 2, drop_last, num_replicas=world, rank=r, interleave=interleave
        )
        for r in range(world)
    ]
    for sampler in ranks:
        sampler.resize(1, 2)
    iterators = [iter(sampler) for sampler in ranks]
    seen: list[int] = []
    while True:
        if rng.random() < change:
            resize_all(ranks, rng.randint(1, 6), rng.randint(1, 5))
        plan, batch_idx = ranks[0].plan, ranks[0].handed
        assert_consistent(plan)
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:
            break
        assert len(ranks[0]) == plan.num_batches or ranks[0].handed == plan.num_batches
        own = [plan.local_size(batch_idx, r) for r in range(world)]
        assert max(own) - min(own) <= 1
        assert [len(batch) for batch in batches] == [max(1, n) for n in own]
        seen += [i for batch, n in zip(batches, own, strict=True) for i in batch[:n]]
    assert plan.num_batches == batch_idx
    assert_windows_whole(plan)
    dropped = num_samples - len(seen)
    assert sorted(seen) == list(range(num_samples - dropped))
    assert dropped < plan.last.micro_batch * world if drop_last else dropped == 0


def resize_all(ranks: list[AdaptiveBatchSampler], micro_batch: int, accumulate: int) -> None:
    handed, before = ranks[0].handed, ranks[0].plan.segment(ranks[0].handed)
    starts = {sampler.resize(micro_batch, accumulate) for sampler in ranks}
    (start,) = starts
    assert [(s.batch_size, s.accumulate) for s in ranks] == [(micro_batch, accumulate)] * len(ranks)
    if start is not None:
        assert start >= handed
        assert start % accumulate == 0
        assert ranks[0].plan.segment(start)[1:] == (micro_batch, accumulate)
        if start > handed:
            assert ranks[0].plan.segment(handed) == before


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_sizes_do_each_sample_comes_once_and_no_window_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(250):
        random_epoch(rng)


@pytest.mark.parametrize("old", range(1, 7))
@pytest.mark.parametrize("new", range(1, 7))
def test_a_change_begins_where_windows_of_both_accumulations_begin(old: int, new: int) -> None:
    plan = plan_of(1000, 1, (0, 1, old))
    for at_least in range(40):
        start = plan.boundary(at_least, new)
        whole = [b for b in range(at_least, 200) if b % old == 0 and b % new == 0]
        assert start == whole[0]


def test_a_change_that_waits_is_not_overtaken() -> None:
    plan = plan_of(1000, 1, (0, 4, 2)).resized(6, 8, 3)
    assert plan.boundary(2, 5) == 15
    assert plan.boundary(2, 1) == 6


def test_the_same_sizes_again_are_no_new_segment() -> None:
    plan = plan_of(1000, 1, (0, 4, 2)).resized(6, 4, 2).resized(8, 5, 2).resized(8, 4, 2)
    assert plan.segments == ((0, 4, 2),)


@pytest.mark.parametrize(
    ("samples", "batches"),
    [(0, 0), (1, 1), (2, 1), (3, 2), (8, 4), (9, 5), (14, 5), (15, 6), (20, 6), (99, 6)],
)
def test_batches_to_cover_by_hand(samples: int, batches: int) -> None:
    # Two ranks; four batches of 1 each, then batches of 3 each: ends 2, 4, 6, 8, 14, 20.
    assert plan_of(20, 2, (0, 1, 1), (4, 3, 1)).batches_to_cover(samples) == batches


def test_batches_to_cover_counts_those_before_a_resume() -> None:
    plan = plan_of(20, 2, (0, 1, 1)).redistributed(1, 3, 6)
    assert [plan.batches_to_cover(n) for n in (6, 7, 8, 20)] == [3, 4, 5, 17]


def test_batches_to_cover_leaves_a_dropped_batch_out() -> None:
    plan = plan_of(7, 1, (0, 3, 1), drop_last=True)
    assert [plan.batches_to_cover(n) for n in (6, 7)] == [2, 2]


def test_a_window_is_cut_where_the_epoch_is_cut() -> None:
    plan = plan_of(100, 1, (0, 2, 4))
    assert plan.window(5) == (4, 8)
    assert plan.window(5, num_batches=6) == (4, 6)
    assert plan.share(5, 0, num_batches=6).window == 4


def test_the_next_epoch_begins_with_the_last_sizes() -> None:
    plan = plan_of(100, 2, (0, 2, 1)).resized(4, 3, 2).next_epoch()
    assert plan == plan_of(100, 2, (0, 3, 2))


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_change_that_waits_is_void_where_more_ranks_finish_before_it(
    world: int, drop_last: bool
) -> None:
    plan = plan_of(100, 1, (0, 4, 1), (12, 8, 2), drop_last=drop_last)
    rest = plan.redistributed(world, 8, 32)
    assert_consistent(rest)
    assert all(begin < end for begin, end in map(rest.span, range(8, rest.num_batches)))


def test_a_large_epoch_is_looked_up_and_not_counted() -> None:
    plan = plan_of(10**12, 8, (0, 1, 1), (10**6, 4, 2))
    assert plan.batches_to_cover(8 * 10**6 + 33) == 10**6 + 2
    assert plan.num_batches == 10**6 + math.ceil((10**12 - 8 * 10**6) / 32)
