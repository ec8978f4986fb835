"""Where a run stands in its data: with workers that fetch ahead, and after a resume."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from lightning_ext.data import AdaptiveBatchSampler, SeededPermutation

NUM_SAMPLES = 61
WORKERS = pytest.mark.parametrize(
    ("num_workers", "persistent"), [(0, False), (2, False), (2, True)]
)


def sampler_of(world: int = 1, rank: int = 0, **kwargs: Any) -> AdaptiveBatchSampler:
    order = SeededPermutation(NUM_SAMPLES, seed=2)
    return AdaptiveBatchSampler(order, 2, num_replicas=world, rank=rank, **kwargs)


def loader_of(sampler: AdaptiveBatchSampler, num_workers: int, persistent: bool) -> DataLoader[Any]:
    return DataLoader(
        range(NUM_SAMPLES),
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=persistent,
    )


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@WORKERS
def test_sizes_change_in_flight(num_workers: int, persistent: bool) -> None:
    sampler = sampler_of()
    loader = loader_of(sampler, num_workers, persistent)
    for changes in ({2: (5, 1), 6: (1, 1)}, {0: (3, 2), 5: (7, 3)}):
        seen, sizes = [], []
        for batch_idx, batch in enumerate(loader):
            sizes.append(len(batch))
            seen += batch.tolist()
            if batch_idx in changes:
                start = sampler.resize(*changes[batch_idx])
                assert start is not None
                assert start >= sampler.handed > batch_idx
        planned = [sampler.plan.span(b) for b in range(sampler.plan.num_batches)]
        assert sizes == [end - begin for begin, end in planned]
        assert sorted(seen) == list(range(NUM_SAMPLES))
        assert len(set(sizes)) > 2


@WORKERS
def test_the_position_counts_what_was_consumed(num_workers: int, persistent: bool) -> None:
    whole = [i for batch in sampler_of() for i in batch]
    sampler = sampler_of()
    batches = iter(loader_of(sampler, num_workers, persistent))
    seen = []
    for _ in range(5):
        seen += next(batches).tolist()
        sampler.consume()
    assert (sampler.consumed, sampler.state_dict()["consumed_samples"]) == (5, 10)
    assert (sampler.handed > 5) is (num_workers > 0)
    resumed = sampler_of()
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    seen += [i for batch in loader_of(resumed, num_workers, persistent) for i in batch.tolist()]
    assert seen == whole


def test_what_was_handed_out_counts_where_nobody_consumes() -> None:
    sampler = sampler_of()
    batches = iter(sampler)
    next(batches)
    assert sampler.consumed == sampler.handed == 1


@pytest.mark.parametrize("stop", [0, 1, 5, 9, 14, 15])
def test_a_change_that_waits_is_kept(stop: int) -> None:
    sampler = sampler_of()
    sampler.resize(4, 3, not_before=7)
    batches = iter(sampler)
    for _ in range(stop):
        next(batches)
    resumed = sampler_of()
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    assert list(resumed) == list(batches)
    assert (resumed.plan, len(resumed)) == (sampler.plan, len(sampler))
    assert (resumed.batch_size, resumed.accumulate) == (4, 3)
    assert list(resumed) == list(sampler)


def test_a_position_inside_a_window_begins_a_shorter_one() -> None:
    sampler = sampler_of()
    sampler.resize(4, 3)
    batches = iter(sampler)
    for _ in range(4):
        next(batches)
    resumed = sampler_of()
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    resumed.cut_window()
    weights = [resumed.share(b).loss_weight() for b in (4, 5)]
    assert [resumed.share(b).window for b in (4, 5, 6)] == [8, 8, 12]
    assert weights == [3 / 2, 3 / 2]  # two parts of a mean that the Trainer divides by three
    assert list(resumed) == list(batches)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_position_at_the_end_of_an_epoch_goes_on_with_the_next(epochs: int) -> None:
    sampler = sampler_of()
    for _ in range(epochs):
        list(sampler)
    resumed = sampler_of()
    resumed.load_state_dict(sampler.state_dict())
    assert len(resumed) == 31
    assert list(resumed) == list(sampler)
    assert resumed.epoch == sampler.epoch == epochs


def test_a_random_sampler_without_a_seed_goes_on_with_the_order_that_it_drew() -> None:
    sampler = AdaptiveBatchSampler(RandomSampler(range(20)), 3)
    batches = iter(sampler)
    next(batches)
    resumed = AdaptiveBatchSampler(RandomSampler(range(20)), 3)
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    assert list(resumed) == list(batches)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 4), (2, 16)])
def test_another_number_of_ranks_sees_the_rest_exactly_once(
    before: int, after: int, stop: int, interleave: bool
) -> None:
    old = [sampler_of(before, r, interleave=interleave) for r in range(before)]
    new = [sampler_of(after, r, interleave=interleave) for r in range(after)]
    seen = []
    for sampler in old:
        sampler.resize(3, 2, not_before=6)
        batches = iter(sampler)
        seen += [i for _ in range(stop) for i in next(batches)]
    for sampler in new:
        sampler.load_state_dict(through_a_file(old[0].state_dict()))
        for batch_idx, batch in enumerate(sampler, start=stop):
            seen += batch[: sampler.share(batch_idx).local]
    assert sorted(seen) == list(range(NUM_SAMPLES))
    assert {sampler.epoch for sampler in new} == {0}
    following = [i for sampler in new for batch in list(sampler)[:1] for i in batch]
    assert len(following) == min(3 * after, NUM_SAMPLES)


def test_batches_go_on_being_counted_on_another_number_of_ranks() -> None:
    old, new = sampler_of(2), sampler_of(1)
    batches = iter(old)
    for _ in range(3):
        next(batches)
    new.load_state_dict(old.state_dict())
    assert new.consumed == 3
    assert new.plan.span(3) == (12, 14)
    assert len(new) == 3 + 25  # 61 − 12 left, two at a time


def test_a_data_set_of_another_length_is_refused() -> None:
    state = AdaptiveBatchSampler(range(10), 2).state_dict()
    with pytest.raises(ValueError, match=r"written with 10 samples per epoch, this sampler has 61"):
        sampler_of().load_state_dict(state)
