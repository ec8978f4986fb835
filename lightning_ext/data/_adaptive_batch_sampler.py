"""A batch sampler that can change its sizes between two batches and lose no sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from lightning_ext.data._epoch_plan import EpochPlan, Segment, Share
from lightning_ext.data._seeded_permutation import SeededPermutation, seeded_order


class AdaptiveBatchSampler(BatchSampler):
    r"""Batches of a size that is read anew for every batch, sliced for this rank.

    Every sample is yielded once per epoch over all ranks, whatever the sizes did: there is no
    padding. Where the last batch does not divide, ranks get sizes that differ by one at most
    (:meth:`share` says by how much to weigh them). A rank that would get nothing repeats one
    sample, to be weighed with 0.

    Args:
        sampler: Order of the samples. A :class:`~torch.utils.data.RandomSampler` is replaced by
            :class:`SeededPermutation` where ``seed`` is given; a
            :class:`~torch.utils.data.DistributedSampler` gives its seed, shuffle and ranks; of any
            other sampler one full pass is drawn at the first batch of each epoch.
        batch_size: Samples of one batch on one rank (``micro_batch``); may be assigned later.
        drop_last: Leave out a last batch that is not full.
        seed: Makes the order of a ``RandomSampler`` a function of (seed, epoch).
        num_replicas: Data-parallel ranks that share every batch.
        rank: Index of this rank among them.
        interleave: Give rank r every ``num_replicas``-th sample of a batch, as
            ``DistributedSampler`` does, and not the r-th run of consecutive samples.

    Raises:
        TypeError: The sampler has no length.
        ValueError: A size or rank out of range, a seed for a sampler that cannot use one, or a
            subclass of ``DistributedSampler`` with an order of its own.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> from lightning_ext.data import AdaptiveBatchSampler
        >>> sampler = AdaptiveBatchSampler(SequentialSampler(range(7)), batch_size=2)
        >>> batches = iter(sampler)
        >>> next(batches)
        [0, 1]
        >>> sampler.batch_size = 3
        >>> list(batches)
        [[2, 3, 4], [5, 6]]
    """

    # Notes of whoever trains with it.
    rescale_last_window = True
    reference_batch: int | None = None
    user_sizes: tuple[int, int] | None = None  # micro-batch and accumulation before any change
    tracked = False  # True: `consume` counts; False: what was handed out counts as consumed

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        *,
        seed: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        interleave: bool = False,
    ) -> None:
        _check_positive("batch_size", batch_size)
        if isinstance(sampler, DistributedSampler):
            num_replicas, rank = sampler.num_replicas, sampler.rank
        self.sampler: Any = seeded_order(sampler, seed)
        self.drop_last = bool(drop_last)
        self.interleave = interleave
        self._epoch = 0
        self._order: list[int] | None = None
        self._start = self._handed = self._consumed = 0
        self._rank = 0
        first = Segment(0, batch_size, 1)
        self._plan = EpochPlan(len(self.sampler), 1, self.drop_last, (first,))
        self._next = self._plan
        self.set_ranks(num_replicas, rank)

    def set_ranks(self, num_replicas: int, rank: int) -> None:
        """Shares every batch among ``num_replicas`` ranks; only before the first batch."""
        _check_positive("num_replicas", num_replicas)
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank was {rank}; it must be in [0, {num_replicas}).")
        self._rank = rank
        first = Segment(0, self.batch_size, self.accumulate)
        self._plan = EpochPlan(len(self.sampler), num_replicas, self.drop_last, (first,))
        self._next = self._plan

    @property
    def num_replicas(self) -> int:
        """Ranks that share every batch."""
        return self._plan.data_parallel_size

    @property
    def rank(self) -> int:
        """Index of this rank."""
        return self._rank

    @property
    def batch_size(self) -> int:
        """Samples of one batch on one rank, as last asked for."""
        return self._next.last.micro_batch

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self.resize(batch_size, self.accumulate)

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step, as last asked for."""
        return self._next.last.accumulate

    @property
    def epoch(self) -> int:
        """Number of the running epoch."""
        return self._epoch

    @property
    def plan(self) -> EpochPlan:
        """Layout of the running epoch."""
        return self._plan

    @property
    def handed(self) -> int:
        """Batches of the running epoch that the loader has fetched; their sizes are settled."""
        return self._handed

    @property
    def consumed(self) -> int:
        """Batches of the running epoch that training has used."""
        return self._consumed if self.tracked else self._handed

    def resize(
        self,
        batch_size: int,
        accumulate: int = 1,
        *,
        not_before: int = 0,
        num_batches: int | None = None,
    ) -> int | None:
        """Asks for new sizes at the first batch where a window of both accumulations begins.

        Args:
            batch_size: Samples of one batch on one rank.
            accumulate: Batches per optimizer step.
            not_before: Earliest batch; batches that were handed out already stay as they are.
            num_batches: Where the epoch is cut short, if it is.

        Returns:
            The batch from which on the sizes hold, or ``None`` where that is the next epoch.
        """
        _check_positive("batch_size", batch_size)
        _check_positive("accumulate", accumulate)
        end = min(self._plan.num_batches, num_batches or self._plan.num_batches)
        start = self._plan.boundary(max(not_before, self._handed), accumulate)
        if start < end:
            self._plan = self._plan.resized(start, batch_size, accumulate)
        self._next = self._plan.next_epoch().resized(0, batch_size, accumulate)
        return start if start < end else None

    def consume(self) -> None:
        """Counts one batch that training has used."""
        self.tracked = True
        self._consumed += 1

    def share(self, batch_idx: int, num_batches: int | None = None) -> Share:
        """What this rank's batch contributes to its optimizer step."""
        return self._plan.share(batch_idx, self._rank, num_batches)

    def next_epoch(self) -> None:
        """Ends the running epoch, wherever it stands."""
        self._epoch += 1
        self._plan = self._next
        self._order = None
        self._start = self._handed = self._consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """Numbers the running epoch, or the next one where the running one is used up.

        The permutation follows if nothing of that epoch was drawn yet.
        """
        if self._used_up:
            self.next_epoch()
        self._epoch = epoch

    @property
    def _used_up(self) -> bool:
        return 0 < self._plan.num_batches <= self.consumed

    def __iter__(self) -> Iterator[list[int]]:
        """Yields lists of indices: the running epoch from where it stands, else the next one."""
        if self.consumed > self._start or self._used_up:
            self.next_epoch()
        self._handed = self._start
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        if self._order is None:
            self._order = self._draw()
        while self._handed < self._plan.num_batches:
            batch_idx = self._handed
            self._handed += 1
            yield self._slice(batch_idx, self._order)

    def _draw(self) -> list[int]:
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(self._epoch)
        order, expected = list(self.sampler), self._plan.num_samples
        if len(order) != expected:
            raise ValueError(
                f"The {type(self.sampler).__name__} yielded {len(order)} samples; it must yield the"
                f" {expected} that len() announced when this sampler was built."
            )
        return order

    def _slice(self, batch_idx: int, order: list[int]) -> list[int]:
        begin, end = self._plan.span(batch_idx)
        if self.interleave:
            mine = order[begin + self._rank : end : self.num_replicas]
        else:
            mine = order[slice(*self._plan.local_span(batch_idx, self._rank))]
        return mine or order[begin : begin + 1]

    def __len__(self) -> int:
        """Batches of the running epoch, or of the next one where the running one is used up."""
        return (self._next if self._used_up else self._plan).num_batches

    def cut_window(self) -> None:
        """Has a window that was begun go on as a shorter one.

        A checkpoint does not hold the gradient of the batches before it; this leaves them out of
        the step's mean.
        """
        consumed = self.consumed
        if consumed % self._plan.segment(consumed).accumulate:
            sample = self._plan.span(consumed)[0]
            self._plan = self._plan.redistributed(self.num_replicas, consumed, sample)

    def forget_pending(self) -> None:
        """Drops sizes that were asked for and are not in force yet."""
        self._plan = self._plan.until(self.consumed)
        self._next = self._plan.next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position that training has reached, not what workers have fetched ahead."""
        plan, consumed = self._plan, self.consumed
        state: dict[str, Any] = {
            "epoch": self._epoch,
            "num_samples": plan.num_samples,
            "num_replicas": plan.data_parallel_size,
            "consumed": consumed,
            "consumed_samples": plan.span(consumed)[0],
            "begun": [plan.first_batch, plan.first_sample],
            "segments": [list(segment) for segment in plan.segments],
            "next": list(self._next.last),
        }
        if self._order is not None and not isinstance(self.sampler, SeededPermutation):
            state["order"] = torch.tensor(self._order)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position; on another number of ranks, from the next sample on.

        Raises:
            ValueError: The state belongs to a data set of another length.
        """
        if state["num_samples"] != len(self.sampler):
            raise ValueError(
                f"The checkpoint was written with {state['num_samples']} samples per epoch, this"
                f" sampler has {len(self.sampler)}. Resume with the same data set."
            )
        self._epoch = state["epoch"]
        self._order = state["order"].tolist() if "order" in state else None
        self._consumed = self._handed = self._start = state["consumed"]
        segments = tuple(Segment(*segment) for segment in state["segments"])
        size, ranks = state["num_samples"], state["num_replicas"]
        plan = EpochPlan(size, ranks, self.drop_last, segments, *state["begun"])
        if ranks != self.num_replicas:
            at = state["consumed"], state["consumed_samples"]
            plan = plan.redistributed(self.num_replicas, *at)
        self._plan = plan
        self._next = plan.next_epoch().resized(0, *state["next"][1:])


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} was {value!r}; it must be a positive integer.")
