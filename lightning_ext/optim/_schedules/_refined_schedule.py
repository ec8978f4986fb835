"""The schedule that the gradient norms of an earlier run suggest.

Source: Defazio et al. 2023, arXiv:2310.07831, section 3.
Differs: positions count samples, and the table stretches to another length.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch.optim import Optimizer

from lightning_ext import scaling
from lightning_ext.optim._schedules._sample_schedule import SampleSchedule


class RefinedSchedule(SampleSchedule):
    r"""Follows a table of factors, lines between them.

    :class:`~lightning_ext.callbacks.GradientNormRecorder` makes one from the gradient norms of an
    earlier run, for runs like it and at its batch.

    Args:
        optimizer: The wrapped optimizer; its ``lr`` is the peak.
        table: The factors and their positions.
        total_samples: Samples of this run, over which the table is stretched; ``None`` leaves the
            table's own positions.
        samples_per_step: As of :class:`~lightning_ext.optim.SampleSchedule`.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> import torch
        >>> from lightning_ext.optim import RefinedSchedule
        >>> from lightning_ext.scaling import FactorTable
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> table = FactorTable((0, 10, 20), (1.0, 0.5, 0.0))
        >>> schedule = RefinedSchedule(optimizer, table, samples_per_step=5)
        >>> optimizer.step()
        >>> schedule.step()
        >>> schedule.get_last_lr()
        [0.75]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        table: scaling.FactorTable,
        *,
        total_samples: int | None = None,
        samples_per_step: int | None = None,
    ) -> None:
        if not isinstance(table, scaling.FactorTable):
            raise TypeError(
                f"table was {table!r}; allowed is a scaling.FactorTable. Hint:"
                " RefinedSchedule.from_file(optimizer, path, samples_per_step=...) reads one."
            )
        factor = partial(table.at, total_samples=total_samples)
        super().__init__(optimizer, factor, samples_per_step=samples_per_step)

    @classmethod
    def from_file(
        cls,
        optimizer: Optimizer,
        path: str | Path,
        *,
        total_samples: int | None = None,
        samples_per_step: int | None = None,
    ) -> RefinedSchedule:
        """Reads the table that ``GradientNormRecorder.save`` wrote.

        Args:
            optimizer: The wrapped optimizer.
            path: The file.
            total_samples: As above.
            samples_per_step: As above.

        Raises:
            ValueError: The file holds no table.
        """
        table = scaling.FactorTable.from_json(Path(path).read_text(encoding="utf-8"))
        return cls(optimizer, table, total_samples=total_samples, samples_per_step=samples_per_step)
