"""Sizes that change between two batches."""

from __future__ import annotations

import pytest
from torch.utils.data import BatchSampler, SequentialSampler

from lightning_ext.data import AdaptiveBatchSampler


def sampler_of(num_samples: int, batch_size: int = 2, **kwargs) -> AdaptiveBatchSampler:
    return AdaptiveBatchSampler(SequentialSampler(range(num_samples)), batch_size, **kwargs)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("after", range(6))
def test_the_size_may_change_after_any_batch(new: int, after: int) -> None:
    sampler = sampler_of(11)
    batches = iter(sampler)
    drawn = [next(batches) for _ in range(after)]
    sampler.batch_size = new
    expected = len(sampler)
    drawn += batches
    assert [i for batch in drawn for i in batch] == list(range(11))
    assert {len(batch) for batch in drawn[after:-1]} <= {new}
    assert len(drawn) == expected


def test_it_is_a_batch_sampler() -> None:
    assert isinstance(sampler_of(5), BatchSampler)
    assert list(sampler_of(5)) == list(BatchSampler(SequentialSampler(range(5)), 2, False))


def test_the_length_follows_each_change_and_then_the_next_epoch() -> None:
    sampler = sampler_of(12)
    batches = iter(sampler)
    lengths = [len(sampler)]
    next(batches)
    sampler.batch_size = 5  # 2 + 5 + 5
    lengths.append(len(sampler))
    list(batches)
    lengths.append(len(sampler))  # 5 + 5 + 2
    sampler.batch_size = 6
    lengths.append(len(sampler))
    assert lengths == [6, 3, 3, 2]
    assert len(list(sampler)) == 2


def test_resize_tells_from_which_batch_on_it_holds() -> None:
    sampler = sampler_of(100)
    sampler.resize(2, 3)
    batches = iter(sampler)
    for _ in range(4):
        next(batches)
    assert sampler.resize(5, 2) == 6
    assert [len(batch) for batch in batches] == [2, 2, *[5] * 17, 3]


def test_not_before_delays_a_change() -> None:
    assert sampler_of(100).resize(4, 2, not_before=7) == 8


def test_a_change_beyond_the_last_batch_waits_for_the_next_epoch() -> None:
    sampler = sampler_of(8)
    assert sampler.resize(4, 1, not_before=4) is None
    assert (sampler.batch_size, sampler.plan.last.micro_batch) == (4, 2)
    assert [len(batch) for batch in sampler] == [2, 2, 2, 2]
    assert [len(batch) for batch in sampler] == [4, 4]


def test_an_epoch_that_is_cut_short_ends_before_its_plan() -> None:
    sampler = sampler_of(20)
    assert sampler.resize(4, 1, not_before=5, num_batches=5) is None
    assert sampler_of(20).resize(4, 1, not_before=5, num_batches=6) == 5


def test_batches_that_were_handed_out_stay_as_they_are() -> None:
    sampler = sampler_of(20)
    batches = iter(sampler)
    for _ in range(3):
        next(batches)
    assert sampler.resize(7, 1, not_before=0) == 3
    assert [sampler.plan.span(b) for b in range(5)] == [(0, 2), (2, 4), (4, 6), (6, 13), (13, 20)]


def test_drop_last_leaves_out_what_is_not_full_over_all_ranks() -> None:
    ranks = [sampler_of(11, 2, drop_last=True, num_replicas=2, rank=r) for r in (0, 1)]
    assert [list(sampler) for sampler in ranks] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert len(ranks[0]) == 2


def test_an_epoch_without_a_full_batch_is_empty() -> None:
    sampler = sampler_of(3, 4, drop_last=True)
    assert [len(sampler), *sampler, *sampler, sampler.epoch] == [0, 0]


def test_an_epoch_that_is_left_early_is_over() -> None:
    sampler = sampler_of(6)
    next(iter(sampler))
    assert list(sampler) == [[0, 1], [2, 3], [4, 5]]
    assert sampler.epoch == 1


def test_an_iterator_of_which_nothing_was_used_costs_nothing() -> None:
    sampler = sampler_of(6)
    sampler.tracked = True
    next(iter(sampler))  # fetched ahead, never trained on
    assert list(sampler) == [[0, 1], [2, 3], [4, 5]]
    assert sampler.epoch == 0


def test_set_ranks_keeps_the_sizes() -> None:
    sampler = sampler_of(24)
    sampler.resize(3, 2)
    sampler.set_ranks(4, 1)
    assert (sampler.batch_size, sampler.accumulate, sampler.num_replicas) == (3, 2, 4)
    assert list(sampler) == [[3, 4, 5], [15, 16, 17]]


def test_a_change_in_each_step_leaves_no_trail() -> None:
    sampler = sampler_of(1000)
    for _ in sampler:
        sampler.batch_size = 2
    assert len(sampler.plan.segments) == 1


@pytest.mark.parametrize("wrong", [0, -3, 2.0, True, None])
def test_a_size_that_is_no_positive_integer_is_named(wrong: object) -> None:
    message = r"batch_size was .*; it must be a positive integer"
    with pytest.raises(ValueError, match=message):
        sampler_of(4, wrong)
    with pytest.raises(ValueError, match=message):
        sampler_of(4).batch_size = wrong
    with pytest.raises(ValueError, match=r"accumulate was .*; it must be a positive integer"):
        sampler_of(4).resize(2, wrong)


@pytest.mark.parametrize(
    ("num_replicas", "rank", "message"),
    [
        (0, 0, r"num_replicas was 0; it must be a positive integer"),
        (2, 2, r"rank was 2; it must be in \[0, 2\)"),
        (2, -1, r"rank was -1; it must be in \[0, 2\)"),
    ],
)
def test_ranks_out_of_range_are_named(num_replicas: int, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of(4, num_replicas=num_replicas, rank=rank)
