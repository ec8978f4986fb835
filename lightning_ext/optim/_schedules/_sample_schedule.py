"""Learning-rate schedules whose axis is samples, not steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class SampleSchedule(LRScheduler):
    r"""Multiplies the learning rate by any function of the samples seen: :math:`\eta_0 f(s)`.

    Each ``step`` adds ``samples_per_step``, which may be assigned between steps;
    :class:`~lightning_ext.callbacks.AdaptiveBatchSize` does so, and the schedule keeps its
    meaning while the global batch changes. Use it with ``interval="step"``.

    Args:
        optimizer: The wrapped optimizer.
        fn: Factor of the initial learning rate as a function of samples seen, ``fn(0)`` first.
        samples_per_step: Samples of one optimizer step (global batch); ``None`` leaves it to
            ``AdaptiveBatchSize``.

    Raises:
        ValueError: ``samples_per_step`` is not positive; at the first ``step``, nobody has set it.

    Example:
        >>> import torch
        >>> from lightning_ext.optim import SampleSchedule
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = SampleSchedule(optimizer, lambda s: 1 - s / 100, samples_per_step=10)
        >>> optimizer.step()
        ... schedule.step()
        ... schedule.get_last_lr()
        [0.9]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        fn: Callable[[float], float],
        *,
        samples_per_step: int | None = None,
    ) -> None:
        if samples_per_step is not None and samples_per_step < 1:
            raise ValueError(f"samples_per_step was {samples_per_step}; it must be positive.")
        self.fn = fn
        self.samples_per_step: float | None = samples_per_step
        self.samples_seen: float = 0
        self._counted_steps = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group, after counting the samples of the steps taken since."""
        # Composites take the first step back, repeat it, or begin at a milestone without `step`:
        # only `last_epoch` tells what counts.
        steps, self._counted_steps = self.last_epoch - self._counted_steps, self.last_epoch
        if steps:
            self.samples_seen += steps * self._samples_of_a_step()
        factor = self.fn(self.samples_seen)
        return [base_lr * factor for base_lr in self.base_lrs]

    def _samples_of_a_step(self) -> float:
        if self.samples_per_step is None:
            raise ValueError(
                f"{type(self).__name__} does not know the samples of a step: samples_per_step was"
                " None, and nothing has set it since. Hint: AdaptiveBatchSize among the Trainer's"
                " callbacks sets it at every step; without it give samples_per_step=, the global"
                " batch."
            )
        return self.samples_per_step

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and the function."""
        return {key: value for key, value in super().state_dict().items() if key != "fn"}


def sample_schedules(scheduler: object) -> Iterator[SampleSchedule]:
    """Yields the sample schedules in a scheduler, those nested in a composite included.

    Args:
        scheduler: Any scheduler; ``SequentialLR`` and ``ChainedScheduler`` are looked into.
    """
    if isinstance(scheduler, SampleSchedule):
        yield scheduler
    for nested in getattr(scheduler, "_schedulers", ()):
        yield from sample_schedules(nested)
