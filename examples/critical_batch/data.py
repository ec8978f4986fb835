"""The language model's windows, read once and cut into micro-batches of any size."""

from __future__ import annotations

from copy import copy

from examples.language_model.data import TextFolder


class SharedText(TextFolder):
    """Windows that all runs of the study share."""

    def at(self, micro_batch: int) -> TextFolder:
        """The same windows in other micro-batches; a run changes nothing else."""
        other = copy(self)
        other.micro_batch = micro_batch
        return other
