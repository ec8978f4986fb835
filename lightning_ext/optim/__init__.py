"""What stands between an optimizer and a batch size that changes."""

from __future__ import annotations

from lightning_ext.optim._batch_scaling import BatchScaling, batch_rule
from lightning_ext.optim._sample_schedule import SampleSchedule, sample_schedules

__all__ = ["BatchScaling", "SampleSchedule", "batch_rule", "sample_schedules"]
