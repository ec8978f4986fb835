"""Which samples of an epoch form which batch, while the sizes change on the way."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_ext import scaling


class Segment(NamedTuple):
    """From batch ``start`` on, ``micro_batch`` samples a rank and ``accumulate`` batches a step."""

    start: int
    micro_batch: int
    accumulate: int


class Share(NamedTuple):
    """What one batch of one rank contributes to its optimizer step, counted in samples.

    Args:
        local: Samples of this rank in this batch.
        across_ranks: Samples of all ranks in this batch.
        window: Samples of all ranks in all batches of the optimizer step.
        accumulate: Batches that the step was planned with; the last one may have fewer.
        data_parallel_size: Ranks.
        whole: Whether the step has all the samples that it was planned with.
    """

    local: int
    across_ranks: int
    window: int
    accumulate: int
    data_parallel_size: int
    whole: bool = True

    def loss_weight(self, *, rescale_last_window: bool = True) -> float:
        r"""Factor of the loss that makes the step's gradient a mean over samples.

        The Trainer averages: every batch's mean loss counts :math:`1/K`, every rank's gradient
        :math:`1/W`. With :math:`n_{rj}` samples in batch :math:`j` of rank :math:`r` and
        :math:`n` in the step, the factor is :math:`n_{rj} K W / n`. It is exactly 1 where all
        batches have one size and the step is whole.

        Args:
            rescale_last_window: ``False`` weighs ranks within a batch only (:math:`n_{rj} W / n_j`)
                and leaves a cut or uneven last window as the Trainer treats it.

        Returns:
            The factor, 0 for a rank that got no sample of its own.
        """
        ranks = self.data_parallel_size
        if rescale_last_window:
            return scaling.loss_weight(self.local, self.window, parts=self.accumulate * ranks)
        return scaling.loss_weight(self.local, self.across_ranks, parts=ranks)


@dataclass(frozen=True)
class EpochPlan:
    """The layout of one epoch: an order of samples cut into batches by a list of segments.

    Batches are counted as the Trainer counts them, from 0 in each epoch; a batch holds
    ``micro_batch × data_parallel_size`` consecutive samples of the epoch's order.

    Args:
        num_samples: Samples in the epoch.
        data_parallel_size: Ranks that share each batch.
        drop_last: Leave out a last batch that is not full.
        segments: Sizes in force, by first batch; the first one starts at ``first_batch``.
        first_batch: Batches consumed before this plan begins (after a resume).
        first_sample: Samples consumed before this plan begins.
    """

    num_samples: int
    data_parallel_size: int
    drop_last: bool
    segments: tuple[Segment, ...]
    first_batch: int = 0
    first_sample: int = 0

    @property
    def last(self) -> Segment:
        """The segment that is open to the end."""
        return self.segments[-1]

    @property
    def num_batches(self) -> int:
        """Batches in the epoch, those before ``first_batch`` included."""
        per_batch = self.last.micro_batch * self.data_parallel_size
        left = self.num_samples - self._offset(self.last.start)
        return self.last.start + (
            left // per_batch if self.drop_last else math.ceil(left / per_batch)
        )

    def segment(self, batch_idx: int) -> Segment:
        """The sizes in force at a batch."""
        return next(
            s for s in reversed(self.segments) if s.start <= max(batch_idx, self.first_batch)
        )

    def span(self, batch_idx: int) -> tuple[int, int]:
        """First and one-past-last position, in the epoch's order, of a batch over all ranks."""
        begin = self._offset(batch_idx)
        size = self.segment(batch_idx).micro_batch * self.data_parallel_size
        return begin, min(begin + size, self.num_samples)

    def local_size(self, batch_idx: int, rank: int) -> int:
        """Samples of one rank in a batch; over the ranks they differ by one at most."""
        begin, end = self.local_span(batch_idx, rank)
        return end - begin

    def local_span(self, batch_idx: int, rank: int) -> tuple[int, int]:
        """The part of :meth:`span` that is one rank's, where ranks get consecutive samples."""
        begin, end = self.span(batch_idx)
        whole, rest = divmod(end - begin, self.data_parallel_size)
        first = begin + rank * whole + min(rank, rest)
        return first, first + whole + (rank < rest)

    def share(self, batch_idx: int, rank: int, num_batches: int | None = None) -> Share:
        """What a rank's batch contributes to its step; the epoch is cut at ``num_batches``."""
        _, micro_batch, accumulate = self.segment(batch_idx)
        first, end = self.window(batch_idx, num_batches)
        begin, stop = self.span(batch_idx)
        window = self.span(end - 1)[1] - self.span(first)[0]
        return Share(
            local=self.local_size(batch_idx, rank),
            across_ranks=stop - begin,
            window=window,
            accumulate=accumulate,
            data_parallel_size=self.data_parallel_size,
            whole=window == micro_batch * accumulate * self.data_parallel_size,
        )

    def window(self, batch_idx: int, num_batches: int | None = None) -> tuple[int, int]:
        """First and one-past-last batch of the accumulation window that holds a batch."""
        accumulate = self.segment(batch_idx).accumulate
        first = batch_idx - batch_idx % accumulate
        end = min(first + accumulate, self.num_batches if num_batches is None else num_batches)
        return max(first, self.first_batch), max(end, batch_idx + 1)

    def largest_step(self, global_batch: int) -> int:
        """Keeps one step from taking, under ``drop_last``, more samples than there are."""
        return min(global_batch, self.num_samples) if self.drop_last else global_batch

    def batches_to_cover(self, samples: int) -> int:
        """The least number of batches, counted from 0, that hold that many samples."""
        inside = range(self.first_batch, self.num_batches)
        return self.first_batch + bisect_left(inside, samples, key=self._offset)

    def boundary(self, at_least: int, accumulate: int) -> int:
        """First batch, not before ``at_least``, at which both accumulations begin a window.

        The Trainer zeroes gradients where ``batch_idx % K == 0`` and steps where
        ``(batch_idx + 1) % K == 0``: only a common multiple keeps every gradient whole.
        """
        common = math.lcm(self.last.accumulate, accumulate)
        return max(
            math.ceil(at_least / common) * common, math.ceil(self.last.start / common) * common
        )

    def resized(self, start: int, micro_batch: int, accumulate: int) -> EpochPlan:
        """The plan with new sizes from batch ``start`` to the end."""
        kept = tuple(s for s in self.segments if s.start < start)
        new = Segment(start, micro_batch, accumulate)
        changes = not kept or kept[-1][1:] != new[1:]
        return replace(self, segments=(*kept, new) if changes else kept)

    def redistributed(self, data_parallel_size: int, batch: int, sample: int) -> EpochPlan:
        """The rest of the epoch, from a batch and a sample on, on another number of ranks."""
        first = self.segment(batch)._replace(start=batch)
        plan = EpochPlan(
            self.num_samples, data_parallel_size, self.drop_last, (first,), batch, sample
        )
        for later in (s for s in self.segments if s.start > batch):
            if later.start < plan.num_batches:  # more ranks may come to the end before it
                plan = plan.resized(*later)
        return plan

    def until(self, batch: int) -> EpochPlan:
        """The plan without the sizes that would begin after a batch."""
        return replace(self, segments=tuple(s for s in self.segments if s.start <= batch))

    def next_epoch(self) -> EpochPlan:
        """A fresh epoch with the sizes in force at the end of this one."""
        first = self.last._replace(start=0)
        return replace(self, segments=(first,), first_batch=0, first_sample=0)

    def _offset(self, batch_idx: int) -> int:
        offset = self.first_sample
        ends = (*(s.start for s in self.segments[1:]), batch_idx)
        for segment, end in zip(self.segments, ends, strict=True):
            batches = max(0, min(end, batch_idx) - max(segment.start, self.first_batch))
            offset += batches * segment.micro_batch * self.data_parallel_size
        return min(offset, self.num_samples)
