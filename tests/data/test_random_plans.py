"""Random runs: sizes that change, workers that fetch ahead, kills, resumes on other ranks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext.data import AdaptiveBatchSampler, EpochPlan, SeededPermutation

Sizes = tuple[int, int]  # micro-batch and accumulation
Feed = Callable[[AdaptiveBatchSampler, int], Iterator[list[int]]]


@dataclass(frozen=True)
class Life:
    """Training on some ranks until it is killed, and how far back its last checkpoint lies.

    `ahead` has a number for each rank: batches that its loader has fetched before they are used.
    """

    ahead: tuple[int, ...]
    batches: int
    back: int


class Drawn:
    """An order that is another one each time, and that no seed brings back."""

    def __init__(self, num_samples: int, draw: int) -> None:
        self.num_samples = num_samples
        self.generator = random.Random(draw)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.sample(range(self.num_samples), self.num_samples))


@dataclass(frozen=True)
class Run:
    """Settings of a run; `changes` are asked for after so many batches, counted over epochs.

    Of several at one batch the last is what counts.
    """

    num_samples: int
    order: str
    interleave: bool
    drop_last: bool
    start: Sizes
    epochs: int
    changes: dict[int, list[Sizes]]
    kills: list[Life]
    last: Life

    def sampler(self, num_replicas: int, rank: int, draw: int) -> AdaptiveBatchSampler:
        orders: dict[str, Any] = {
            "sequential": SequentialSampler(range(self.num_samples)),
            "shuffled": SeededPermutation(self.num_samples, seed=3),
            "drawn": Drawn(self.num_samples, draw),
        }
        sampler = AdaptiveBatchSampler(
            orders[self.order],
            1,
            self.drop_last,
            num_replicas=num_replicas,
            rank=rank,
            interleave=self.interleave,
        )
        sampler.tracked = True
        sampler.resize(*self.start)
        return sampler

    def expected(self, epoch: int, seen: list[int]) -> list[int]:
        """The samples of an epoch in their order; one that is drawn is whatever was seen of it."""
        if self.order == "drawn":
            return [*seen, *(i for i in range(self.num_samples) if i not in seen)]
        order = SeededPermutation(self.num_samples, seed=3, shuffle=self.order == "shuffled")
        order.set_epoch(epoch)
        return list(order)


@dataclass(frozen=True)
class Batch:
    """One batch that was trained on: where, its samples by rank, its sizes and loss weights."""

    epoch: int
    batch_idx: int
    is_last: bool
    samples: list[list[int]]
    sizes: Sizes
    weights: list[float]
    window: int


@dataclass
class History:
    """What survives: batches, a checkpoint after each, layouts of finished epochs, resumes."""

    batches: list[Batch] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[int, EpochPlan] = field(default_factory=dict)
    resumed_at: set[int] = field(default_factory=set)

    def cut(self, length: int) -> dict[str, Any]:
        """Loses all that came after so many batches; returns the checkpoint written there."""
        del self.batches[length:], self.checkpoints[length + 1 :]
        epoch = self.batches[-1].epoch if self.batches else -1
        self.finished = {e: plan for e, plan in self.finished.items() if e < epoch}
        self.resumed_at = {at for at in self.resumed_at if at < length} | {length}
        return self.checkpoints[-1]


def fetched_ahead(sampler: AdaptiveBatchSampler, ahead: int) -> Iterator[list[int]]:
    """As a loader with workers does it, without them."""
    batches = iter(sampler)
    queue = deque(islice(batches, ahead))
    while True:
        queue.extend(islice(batches, 1))
        if not queue:
            return
        yield queue.popleft()


def fetched_by_workers(sampler: AdaptiveBatchSampler, ahead: int) -> Iterator[list[int]]:
    """By a real loader: two workers, or none where nothing is fetched ahead."""
    loader: DataLoader[Any] = DataLoader(
        range(len(sampler.sampler)),
        batch_sampler=sampler,
        num_workers=2 if ahead else 0,
        prefetch_factor=ahead // 2 if ahead else None,
    )
    for batch in loader:
        yield batch.tolist()


def the_same(ranks: list[AdaptiveBatchSampler]) -> AdaptiveBatchSampler:
    """One of the ranks, after a look that they agree on everything but who they are."""
    first, *others = ranks
    state = first.state_dict()
    order = state.pop("order", None)
    for other in others:
        theirs = other.state_dict()
        assert (theirs.pop("order", None) is None) is (order is None)
        assert theirs == state
        assert (other.plan, len(other)) == (first.plan, len(first))
    return first


def begin(
    run: Run, life: Life, checkpoint: dict[str, Any] | None, draw: int
) -> list[AdaptiveBatchSampler]:
    world = len(life.ahead)
    ranks = [run.sampler(world, rank, draw) for rank in range(world)]
    for sampler in ranks if checkpoint else ():
        sampler.load_state_dict(checkpoint or {})
        if sampler.consumed < sampler.plan.num_batches:
            sampler.cut_window()
    return ranks


def consume(ranks: list[AdaptiveBatchSampler], drawn: list[list[int]]) -> Batch:
    sampler = ranks[0]
    batch_idx = sampler.consumed
    shares = [rank.share(batch_idx) for rank in ranks]
    assert [len(part) for part in drawn] == [max(1, share.local) for share in shares]
    for rank in ranks:
        rank.consume()
    return Batch(
        epoch=sampler.epoch,
        batch_idx=batch_idx,
        is_last=batch_idx + 1 == sampler.plan.num_batches,
        samples=[part[: share.local] for part, share in zip(drawn, shares, strict=True)],
        sizes=sampler.plan.segment(batch_idx)[1:],
        weights=[share.loss_weight() for share in shares],
        window=shares[0].window,
    )


def resize(ranks: list[AdaptiveBatchSampler], changes: list[Sizes]) -> None:
    handed = [sampler.handed for sampler in ranks]
    for sizes in changes:
        starts = set()
        for rank, sampler in enumerate(ranks):
            others = max(handed[:rank] + handed[rank + 1 :], default=0)
            starts.add(sampler.resize(*sizes, not_before=others))
        assert len(starts) == 1
        assert starts == {None} or starts.pop() >= max(handed)


def live(run: Run, life: Life, history: History, feed: Feed, limit: int) -> None:
    """Trains until `limit` batches of the history, or to the end of the run."""
    checkpoint = history.checkpoints[-1] if history.checkpoints else None
    ranks = begin(run, life, checkpoint, draw=len(history.resumed_at))
    if checkpoint is None:
        history.checkpoints.append(the_same(ranks).state_dict())
    elif 0 < ranks[0].plan.num_batches <= ranks[0].consumed:
        history.finished[ranks[0].epoch] = ranks[0].plan
    while True:
        feeds = [feed(s, n) for s, n in zip(ranks, life.ahead, strict=True)]
        drawn = [next(f, None) for f in feeds]
        if ranks[0].epoch >= run.epochs:
            return
        assert ranks[0].epoch not in history.finished
        while None not in drawn:
            if len(history.batches) == limit:
                return
            history.batches.append(consume(ranks, drawn))
            resize(ranks, run.changes.get(len(history.batches), []))
            history.checkpoints.append(the_same(ranks).state_dict())
            drawn = [next(f, None) for f in feeds]
        assert drawn == [None] * len(ranks)
        assert ranks[0].consumed == ranks[0].plan.num_batches
        history.finished[ranks[0].epoch] = ranks[0].plan
        if ranks[0].plan.num_batches == 0:  # nothing fits: no epoch will ever pass
            return


def train(run: Run, feed: Feed = fetched_ahead) -> History:
    history = History()
    for life in run.kills:
        limit = len(history.batches) + life.batches
        live(run, life, history, feed, limit)
        history.cut(max(0, len(history.batches) - life.back))
    live(run, run.last, history, feed, -1)
    return history


def check_epochs(run: Run, history: History) -> None:
    """Every batch holds the next samples of the order, each sample on one rank."""
    for epoch, plan in history.finished.items():
        batches = [batch for batch in history.batches if batch.epoch == epoch]
        every = [sample for batch in batches for part in batch.samples for sample in part]
        order, position = run.expected(epoch, every), 0
        assert sorted(order) == list(range(run.num_samples))
        assert [batch.batch_idx for batch in batches] == list(range(plan.num_batches))
        for batch in batches:
            seen = [sample for part in batch.samples for sample in part]
            assert sorted(seen) == sorted(order[position : position + len(seen)])
            position += len(seen)
            full = batch.sizes[0] * len(batch.samples)
            assert len(seen) == full or (len(seen) < full and batch is batches[-1])
        lost = len(order) - position
        whole = plan.last.micro_batch * plan.data_parallel_size
        assert 0 <= lost < whole if run.drop_last else lost == 0


def check_windows(history: History) -> None:
    """Walk as the Trainer does: a step at (b + 1) % K == 0 and at the end of an epoch."""
    window: list[Batch] = []
    for index, batch in enumerate(history.batches):
        if index in history.resumed_at:
            window = []  # the checkpoint holds no gradient of it
        if batch.batch_idx % batch.sizes[1] == 0:
            assert not window
        window.append(batch)
        if (batch.batch_idx + 1) % batch.sizes[1] == 0 or batch.is_last:
            check_window(window)
            window = []
    assert not window or len(history.batches) in history.resumed_at


def check_window(window: list[Batch]) -> None:
    samples = [len(part) for batch in window for part in batch.samples]
    weights = [weight for batch in window for weight in batch.weights]
    assert {batch.sizes for batch in window} == {window[0].sizes}
    assert {batch.window for batch in window} == {sum(samples)}
    # Losses are divided by K and gradients by W: with their weights, all samples count alike.
    per_sample = window[0].sizes[1] * len(window[0].samples) / sum(samples)
    for count, weight in zip(samples, weights, strict=True):
        assert abs(weight - count * per_sample) < 1e-12


def lives(max_ranks: int, ahead: st.SearchStrategy[int]) -> st.SearchStrategy[Life]:
    return st.builds(
        Life,
        ahead=st.lists(ahead, min_size=1, max_size=max_ranks).map(tuple),
        batches=st.integers(1, 25),
        back=st.integers(0, 12),
    )


sizes = st.tuples(st.integers(1, 5), st.integers(1, 4))
changes = st.lists(sizes, min_size=1, max_size=3)
runs = st.builds(
    Run,
    num_samples=st.integers(0, 60),
    order=st.sampled_from(["sequential", "shuffled", "drawn"]),
    interleave=st.booleans(),
    drop_last=st.booleans(),
    start=sizes,
    epochs=st.integers(1, 3),
    changes=st.dictionaries(st.integers(1, 30), changes, min_size=1, max_size=5),
    kills=st.lists(lives(4, st.integers(0, 4)), min_size=1, max_size=3),
    last=lives(4, st.integers(0, 4)),
)
with_workers = lives(2, st.sampled_from([0, 2, 4]))
random_runs = settings(max_examples=1000, derandomize=True, deadline=None, database=None)


@random_runs
@given(runs)
def test_nothing_is_lost_or_repeated_and_no_window_is_cut(run: Run) -> None:
    history = train(run)
    check_epochs(run, history)
    check_windows(history)


@random_runs
@given(runs)
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(run: Run) -> None:
    run = replace(run, order="sequential" if run.order == "sequential" else "shuffled")
    same_ranks = [replace(life, ahead=run.last.ahead) for life in run.kills]
    killed = train(replace(run, kills=same_ranks))
    whole = train(replace(run, kills=[]))
    assert [batch.samples for batch in killed.batches] == [b.samples for b in whole.batches]
    assert [batch.sizes for batch in killed.batches] == [b.sizes for b in whole.batches]
    assert killed.finished.keys() == whole.finished.keys()


@settings(random_runs, max_examples=10, phases=[Phase.generate])  # workers are slow to shrink
@given(runs, with_workers, with_workers)
def test_workers_fetch_ahead_as_these_tests_have_it(run: Run, first: Life, last: Life) -> None:
    run = replace(run, num_samples=run.num_samples + 20, epochs=2, kills=[first], last=last)
    history = train(run, fetched_by_workers)
    check_epochs(run, history)
    check_windows(history)
    emulated = train(run)
    assert (history.batches, history.finished) == (emulated.batches, emulated.finished)
