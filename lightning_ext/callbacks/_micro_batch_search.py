"""The search for a micro-batch that trains on every rank, and what it has found so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext import _lightning
from lightning_ext.scaling import Bracket, largest_passing

_FITS, _DOES_NOT_FIT, _RAISED = range(3)


class MicroBatchTrial(NamedTuple):
    """One trial.

    Args:
        micro_batch: Samples.
        length: Their length, 0 where there are no lengths.
        fits: Whether it trained, on all ranks.
        peak_bytes: The most memory that it took on this rank, on top of what was held before; 0
            where it was not measured.
    """

    micro_batch: int
    length: int
    fits: bool
    peak_bytes: int


class MicroBatchSearch:
    """Brackets, one per length, that trials make narrower.

    Args:
        tolerance: Relative width that is narrow enough.
        memory_fraction: Part of the memory that training may take.
        max_memory_bytes: The most that a process may hold, instead.
        make_batch: Makes a batch, with a length as second argument where it is not 0.
        subprocess: Where trials run.
        trial_seconds: The longest that one may take in a child process.
    """

    def __init__(
        self,
        *,
        tolerance: float,
        memory_fraction: float,
        max_memory_bytes: int | None,
        make_batch: Callable[..., Any] | None,
        subprocess: bool | Literal["auto"],
        trial_seconds: float,
    ) -> None:
        self.tolerance = tolerance
        self.memory_fraction = memory_fraction
        self.max_memory_bytes = max_memory_bytes
        self.make_batch = make_batch
        self.subprocess = subprocess
        self.trial_seconds = trial_seconds
        self.reset()

    def reset(self) -> None:
        """Forgets what was found."""
        self.known: dict[int, Bracket] = {}
        self.trials: list[MicroBatchTrial] = []

    def find(
        self, trainer: Trainer, *, length: int, start: int, largest: int, passed: int = 0
    ) -> int:
        """The largest size up to ``largest`` that trains, after as few trials as it takes.

        Args:
            trainer: The Trainer in fit.
            length: Of the samples, 0 where there are no lengths.
            start: The first size to try.
            largest: The largest size of interest.
            passed: A size that is known to train.
        """
        known = self.known.get(length, Bracket())
        known = known._replace(passed=max(known.passed, passed))
        size = known.next_size(start=start, largest=largest, tolerance=self.tolerance)
        if size is not None:
            known = self._search(trainer, length, start, largest, known)
        self.known[length] = known
        return min(known.passed, largest)

    def _search(
        self, trainer: Trainer, length: int, start: int, largest: int, known: Bracket
    ) -> Bracket:
        memory = _lightning.TrialMemory(
            trainer,
            fraction=self.memory_fraction,
            max_bytes=self.max_memory_bytes,
            subprocess=self.subprocess,
        )
        make = self.make_batch or _lightning.batch_maker(trainer)
        shape = (length,) if length else ()
        _lightning.view(trainer).largest(0)  # so that no trial is in what another rank measures
        with _lightning.trials(trainer, memory, seconds=self.trial_seconds) as run:
            found = largest_passing(
                lambda size: self._fits(
                    trainer, length, size, partial(run, partial(make, size, *shape))
                ),
                start=start,
                largest=largest,
                tolerance=self.tolerance,
                known=known,
            )
        if found.passed == 0:
            raise MisconfigurationException(self._nothing_fits(trainer, length, memory))
        return found

    def _fits(
        self, trainer: Trainer, length: int, size: int, run: Callable[[], _lightning.Outcome]
    ) -> bool:
        seen = _lightning.view(trainer)
        with ExitStack() as failing:
            failing.callback(seen.largest, _RAISED)  # the other ranks wait for this one
            outcome = run()
            if outcome.reason == "timed out":
                self._note_time(size)
            failing.pop_all()
        (worst,) = seen.largest(_FITS if outcome.fits else _DOES_NOT_FIT)
        if worst == _RAISED:
            raise RuntimeError(
                f"A trial of {size} samples raised an error on another rank; that rank tells more."
            )
        self.trials.append(MicroBatchTrial(size, length, worst == _FITS, outcome.peak_bytes))
        return worst == _FITS

    def _note_time(self, size: int) -> None:
        text = (
            f"A trial of {size} samples was ended after trial_seconds={self.trial_seconds:g}. Hint:"
            " a higher trial_seconds (a child process has one thread), a lower max_micro_batch, or"
            " subprocess=False."
        )
        if not any(trial.fits for trial in self.trials):
            raise RuntimeError(text)
        warnings.warn(f"{text} It counts as one that does not fit.", stacklevel=2)

    def _nothing_fits(self, trainer: Trainer, length: int, memory: _lightning.TrialMemory) -> str:
        took = self.trials[-1].peak_bytes / 2**20 if self.trials else 0.0
        return (
            f"A micro-batch of 1{f' sample of length {length}' if length else ''} does not train on"
            f" {trainer.strategy.root_device}: it was ended at {took:,.1f} MiB, and the room is"
            f" {memory}. Hint: shorter or smaller samples, activation checkpointing, a lower"
            " precision, or a higher max_memory_bytes."
        )
