"""Where the order of samples comes from."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_ext.data import AdaptiveBatchSampler, SeededPermutation


@pytest.mark.parametrize("seed", [0, 1, 2**31])
@pytest.mark.parametrize("epoch", [0, 1, 9])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_permutation_is_that_of_a_distributed_sampler(seed, epoch, shuffle) -> None:
    theirs = DistributedSampler(range(17), 1, 0, shuffle=shuffle, seed=seed)
    ours = SeededPermutation(17, seed, shuffle=shuffle)
    for sampler in (theirs, ours):
        sampler.set_epoch(epoch)
    assert list(ours) == list(theirs)


def test_the_permutation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(SeededPermutation(17, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_samples was -1; it must be 0 or more"):
        SeededPermutation(-1)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_samples", [24, 25])
def test_without_a_seed_it_is_torchs_batch_sampler_bit_for_bit(drop_last, num_samples) -> None:
    samplers = [
        cls(RandomSampler(range(num_samples)), 4, drop_last)
        for cls in (BatchSampler, AdaptiveBatchSampler)
    ]
    runs, states = [], []
    for sampler in samplers:
        torch.manual_seed(3)
        batches = iter(sampler)
        runs.append([next(batches)])
        states.append([torch.get_rng_state()])
        runs[-1] += [*batches, *sampler, *sampler]
        states[-1].append(torch.get_rng_state())
    assert runs[0] == runs[1]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_generator_of_the_users_own_is_used_as_torch_does() -> None:
    runs, states = [], []
    for cls in (BatchSampler, AdaptiveBatchSampler):
        generator = torch.Generator().manual_seed(8)
        sampler = cls(RandomSampler(range(10), generator=generator), 3, False)
        runs.append([*sampler, *sampler])
        states.append(generator.get_state())
    assert runs[0] == runs[1]
    assert torch.equal(*states)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_interleaved_ranks_are_those_of_a_distributed_sampler(world: int) -> None:
    for rank in range(world):
        theirs = DistributedSampler(range(48), world, rank, seed=7)
        ours = AdaptiveBatchSampler(theirs, 4, interleave=True)
        for epoch in range(3):
            theirs.set_epoch(epoch)
            assert list(ours) == list(BatchSampler(theirs, 4, False))


def test_a_distributed_sampler_gives_seed_ranks_and_shuffle() -> None:
    theirs = DistributedSampler(range(12), 3, 2, shuffle=False, seed=7)
    ours = AdaptiveBatchSampler(theirs, 2)
    assert (ours.num_replicas, ours.rank) == (3, 2)
    assert list(ours) == [[4, 5], [10, 11]]
    shuffled = AdaptiveBatchSampler(DistributedSampler(range(12), 1, 0, seed=7), 12)
    assert list(shuffled) == [list(SeededPermutation(12, 7))]


def test_consecutive_slices_of_2_ranks_are_the_parts_of_1_rank_with_twice_the_accumulation() -> (
    None
):
    order = SeededPermutation(48, seed=1)
    one = AdaptiveBatchSampler(order, 3)
    two = [AdaptiveBatchSampler(order, 3, num_replicas=2, rank=r) for r in (0, 1)]
    one.resize(3, 4)
    for sampler in two:
        sampler.resize(3, 2)
    single = list(one)
    double = [list(sampler) for sampler in two]
    assert [part for pair in zip(*double, strict=True) for part in pair] == single
    # batches 2b and 2b + 1 of one rank are batch b of two: the steps are the same
    windows = [
        (a.window, b.window)
        for a, b in zip(map(one.share, range(0, 16, 2)), map(two[0].share, range(8)), strict=True)
    ]
    assert windows == [(12, 12)] * 8


def test_epochs_advance_the_permutation() -> None:
    sampler = AdaptiveBatchSampler(RandomSampler(range(9)), 9, seed=4)
    epochs = [next(iter(sampler)) for _ in range(3)]
    assert epochs == [
        torch.randperm(9, generator=torch.Generator().manual_seed(4 + e)).tolist() for e in range(3)
    ]


def test_set_epoch_before_each_epoch_selects_its_permutation() -> None:
    plain = AdaptiveBatchSampler(RandomSampler(range(9)), 2, seed=4)
    named = AdaptiveBatchSampler(RandomSampler(range(9)), 2, seed=4)
    for epoch in range(4):
        named.set_epoch(epoch)
        assert list(named) == list(plain)
        assert named.epoch == plain.epoch == epoch


def test_set_epoch_selects_any_permutation() -> None:
    sampler = AdaptiveBatchSampler(RandomSampler(range(9)), 9, seed=4)
    sampler.set_epoch(6)
    (batch,) = sampler
    assert batch == list(SeededPermutation(9, 10))


def test_set_epoch_in_the_middle_leaves_the_running_order_alone() -> None:
    sampler = AdaptiveBatchSampler(RandomSampler(range(9)), 2, seed=4)
    batches = iter(sampler)
    first = next(batches)
    sampler.set_epoch(6)
    assert sorted([*first, *(i for batch in batches for i in batch)]) == list(range(9))


def test_a_weighted_sampler_is_drawn_once_an_epoch() -> None:
    torch.manual_seed(0)
    expected = list(WeightedRandomSampler([1.0, 2.0, 3.0], 8))
    torch.manual_seed(0)
    sampler = AdaptiveBatchSampler(WeightedRandomSampler([1.0, 2.0, 3.0], 8), 3)
    assert [i for batch in sampler for i in batch] == expected


class _Endless:
    def __iter__(self):
        return iter(range(3))


class _Grouped(DistributedSampler):
    def __iter__(self):
        return iter(range(3))


class _Shorter(list):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (_Endless(), TypeError, r"_Endless without a length; .* needs one that has __len__"),
        (SequentialSampler(range(3)), ValueError, r"seed was 1 .*Hint: leave the seed out"),
        (
            RandomSampler(range(3), replacement=True),
            ValueError,
            r"seed was 1 for a RandomSampler; .* without replacement",
        ),
        (
            RandomSampler(range(30), num_samples=3),
            ValueError,
            r"seed was 1 for a RandomSampler; .* and num_samples",
        ),
        (WeightedRandomSampler([1.0], 3), ValueError, r"Hint: seed it yourself"),
        (_Grouped(range(3), 1, 0), ValueError, r"a _Grouped, .* Hint: .* num_replicas and rank"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_order_that_cannot_be_had_is_refused(sampler, error, message) -> None:
    with pytest.raises(error, match=message):
        AdaptiveBatchSampler(sampler, 2, seed=1)


def test_a_sampler_that_does_not_keep_its_word_is_named() -> None:
    sampler = AdaptiveBatchSampler(_Shorter(range(5)), 2)
    with pytest.raises(ValueError, match=r"_Shorter yielded 3 samples; it must yield the 5"):
        next(iter(sampler))
