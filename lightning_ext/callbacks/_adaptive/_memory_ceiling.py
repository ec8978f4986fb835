"""The largest micro-batch that fits: as a finder finds it, and as running out of memory teaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_ext import _lightning
from lightning_ext.callbacks._micro_batch_finder import MicroBatchFinder
from lightning_ext.callbacks._trainer_callbacks import callbacks_of
from lightning_ext.scaling import BatchSplit


class MemoryCeiling:
    """Bounds the micro-batch of a fit.

    Args:
        recover: Whether a batch that runs out of memory is run again in parts.
    """

    def __init__(self, *, recover: bool) -> None:
        self.recover = recover
        self.samples: int | None = None  # the most that are known to fit
        self._finder: MicroBatchFinder | None = None
        self._recovery: Any = None

    def begin(self, trainer: Trainer, on_rerun: Callable[[Any, int], None]) -> None:
        """Watches a fit.

        Args:
            trainer: The Trainer in ``on_train_start``.
            on_rerun: Called with a batch and its index before it is run again.
        """
        self._finder = finder_of(trainer)
        if self.recover and not _lightning.view(trainer).cuts_batches:
            self._recovery = _lightning.recover_from_oom(
                trainer, on_split=self._note, on_rerun=on_rerun, ceiling=self.samples
            )

    def fits(
        self, trainer: Trainer, wanted: BatchSplit, split: Callable[[], BatchSplit]
    ) -> BatchSplit:
        """The sizes, with a smaller micro-batch where those wanted do not fit.

        Args:
            trainer: The Trainer between two steps.
            wanted: Sizes to try.
            split: Makes sizes for the same global batch under the ceiling now known.
        """
        if self._finder is None:
            return wanted
        found = self._finder.ceiling(trainer, wanted.micro_batch)
        if found >= wanted.micro_batch:
            return wanted
        self._note(found)
        return split()

    def end(self) -> None:
        """Leaves the Trainer as it was."""
        if self._recovery is not None:
            self._recovery.detach()
        self._recovery = self._finder = None

    def _note(self, samples: int) -> None:
        self.samples = samples if self.samples is None else min(samples, self.samples)


def finder_of(trainer: Trainer) -> MicroBatchFinder | None:
    """The Trainer's :class:`MicroBatchFinder`, if it has one."""
    return next(iter(callbacks_of(trainer, MicroBatchFinder)), None)
