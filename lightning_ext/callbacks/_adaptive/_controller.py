"""From what a rule proposes to the sizes that the Trainer can run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext.callbacks._adaptive._memory_ceiling import MemoryCeiling
from lightning_ext.callbacks._arguments import require_bool, require_count, require_number
from lightning_ext.scaling import (
    ESTIMATED_FIELDS,
    BatchRule,
    BatchSplit,
    Observation,
    Proposal,
    next_global_batch,
    split_global_batch,
)

_DWELL_STEPS = 16


class Decision(NamedTuple):
    """What to change to, and why."""

    global_batch: int
    proposal: Proposal

    def values(self) -> dict[str, float]:
        """What there is to log of it."""
        target, statistic = self.proposal.target_batch, self.proposal.statistic
        return {"target_batch": float(target), "statistic": float(statistic)}


@dataclass
class BatchController:
    """Limits and hysteresis around a rule.

    A rule that estimates nothing (a schedule) is followed to the letter, within
    ``max_global_batch``; growth, threshold, dwell and monotone damp what is estimated.
    ``memory`` holds the largest micro-batch that was found to fit; it may be below the start.
    """

    rule: BatchRule
    max_global_batch: int
    max_micro_batch: int | None = None
    growth: float = 2.0
    dwell_samples: int | None = None
    threshold: float = 0.2
    monotone: bool = True
    start: BatchSplit = field(default_factory=lambda: BatchSplit(1, 1))
    data_parallel_size: int = 1
    unit: int = 1
    memory: MemoryCeiling = field(default_factory=lambda: MemoryCeiling(recover=False))
    warned: bool = False

    def __post_init__(self) -> None:
        """Refuses what no rule could use."""
        require_number("growth", self.growth, above=1)
        require_number("threshold", self.threshold, least=0)
        require_count("dwell_samples", self.dwell_samples, least=0, optional=True)
        require_bool("monotone", self.monotone)

    @property
    def estimated(self) -> bool:
        """Whether the rule reads estimates, so that its proposals are damped."""
        return bool(self.rule.needs & ESTIMATED_FIELDS)

    @property
    def may_change(self) -> bool:
        """Whether the batch may change during the run: not under a schedule of one size."""
        return len({*getattr(self.rule, "global_batches", (0, 1))}) > 1

    @property
    def damps_lr(self) -> bool:
        """Whether the learning rate gives what the batch cannot reach."""
        return bool(getattr(self.rule, "damps_lr", False))

    def grow_micro_batch(self) -> None:
        """Lets the micro-batch grow as far as memory allows, where no limit was set."""
        self.max_micro_batch = self.max_micro_batch or self.max_global_batch

    def bind(
        self, start: BatchSplit, data_parallel_size: int, unit: int = 1, *, resumes: bool = False
    ) -> None:
        """Fixes the sizes that training starts with, the smallest accumulation among them.

        A run that resumes goes on with the batch of its checkpoint, not with these.

        Raises:
            MisconfigurationException: A limit is below them.
        """
        self.start, self.data_parallel_size, self.unit = start, data_parallel_size, unit
        begins = self.global_batch(start)
        if self.estimated and begins > self.max_global_batch and not resumes:
            raise MisconfigurationException(
                f"max_global_batch={self.max_global_batch} is below the batch that training starts"
                f" with: {start.micro_batch} × {start.accumulate} × {data_parallel_size} ranks ="
                f" {begins}. Hint: raise the limit, or start with a smaller micro-batch."
            )
        self._check_first_move(begins)
        if self.max_micro_batch is not None and self.max_micro_batch < start.micro_batch:
            raise MisconfigurationException(
                f"max_micro_batch={self.max_micro_batch} is below the loader's batch size,"
                f" {start.micro_batch}. Hint: raise the limit, or lower the loader's batch size."
            )

    def _check_first_move(self, begins: int) -> None:
        largest = getattr(self.rule, "max_global_batch", 0)
        if largest > self.max_global_batch:
            rank_zero_warn(
                f"The schedule goes up to {largest}, max_global_batch={self.max_global_batch} cuts"
                " it off there."
            )
        fixed = self.largest_micro_batch == self.start.micro_batch
        unit = begins if fixed else self.start.accumulate * self.data_parallel_size
        if self.estimated and begins * self.growth < begins + unit:
            raise MisconfigurationException(
                f"growth={self.growth} cannot make a first change: the batch grows from {begins} in"
                f" multiples of {unit}. Hint: a growth of at least {1 + unit / begins:g}"
                + (", or a max_micro_batch above the loader's batch size." if fixed else ".")
            )

    def global_batch(self, split: BatchSplit) -> int:
        """Samples per optimizer step."""
        return split.micro_batch * split.accumulate * self.data_parallel_size

    def reachable(self, samples: int) -> int:
        """The largest step that settings, memory and an epoch of so many samples allow."""
        return min(self.global_batch(self.made_of(self.max_global_batch)), samples)

    def dwells(self, global_batch: int, samples_since_change: int) -> bool:
        """Whether it is too early for another change."""
        if not self.estimated:
            return False
        wait = self.dwell_samples
        return samples_since_change < (_DWELL_STEPS * global_batch if wait is None else wait)

    def decide(self, observation: Observation) -> Decision | None:
        """Asks the rule; ``None`` where it has no opinion."""
        proposal = self.rule.propose(observation)
        if proposal is None:
            return None
        if not isinstance(proposal, Proposal) or not proposal.target_batch > 0:
            raise ValueError(
                f"{self.rule} proposed {proposal!r}; allowed is None, or a scaling.Proposal with a"
                " target_batch above 0."
            )
        estimated = self.estimated
        target = next_global_batch(
            observation.global_batch,
            proposal.target_batch,
            max_global_batch=max(self.max_global_batch, observation.global_batch),
            growth=self.growth if estimated else math.inf,
            threshold=self.threshold if estimated else 0.0,
            monotone=self.monotone and estimated,
        )
        return Decision(min(target, self.max_global_batch), proposal)

    def split(self, global_batch: int) -> BatchSplit:
        """Micro-batch and accumulation for a global batch, rounded down to what can be made."""
        found = self.made_of(global_batch)
        made = self.global_batch(found)
        if made != global_batch and not self.estimated and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"A global batch of {global_batch} cannot be made of {self.data_parallel_size}"
                f" ranks × micro-batches of at most {self.largest_micro_batch}: {made} is used,"
                " and other sizes are rounded in the same way."
            )
        return found

    @property
    def largest_micro_batch(self) -> int:
        """What settings and memory allow."""
        limit = self.start.micro_batch if self.max_micro_batch is None else self.max_micro_batch
        return min(limit, self.memory.samples or limit)

    @property
    def _keeps_micro_batch(self) -> bool:
        return self.max_micro_batch is None and self.largest_micro_batch == self.start.micro_batch

    def made_of(self, global_batch: int) -> BatchSplit:
        """The same without a warning.

        Accumulation grows in multiples of the start; a schedule leaves them where that is exacter.
        """
        if self.estimated:
            return self._multiple(global_batch, self.start.accumulate) or self._least()
        units = {1 if self.max_micro_batch is None else self.start.accumulate, 1}
        units = {math.lcm(one, self.unit) for one in units}
        found = [self._multiple(global_batch, unit) for unit in sorted(units, reverse=True)]
        made = [split for split in found if split]
        return max(made, key=self.global_batch, default=self._least())

    def _least(self) -> BatchSplit:
        micro_batch = min(self.start.micro_batch, self.largest_micro_batch)
        return BatchSplit(micro_batch, self.start.accumulate)

    def _multiple(self, global_batch: int, unit: int) -> BatchSplit | None:
        micro_batch, ranks = self.start.micro_batch, self.data_parallel_size
        units = global_batch // (micro_batch * ranks * unit)
        if self._keeps_micro_batch and units:
            return BatchSplit(micro_batch, units * unit)
        if global_batch < ranks * unit:
            return None
        return split_global_batch(
            global_batch,
            data_parallel_size=ranks,
            max_micro_batch=self.largest_micro_batch,
            min_accumulate=unit,
        )
