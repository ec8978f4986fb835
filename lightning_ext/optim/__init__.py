"""What stands between an optimizer and a batch size that changes."""

from __future__ import annotations

from lightning_ext.optim._batch_rule import batch_rule
from lightning_ext.optim._batch_scaling import BatchScaling
from lightning_ext.optim._batch_schedules import LEGWWarmup, PowerScheduler
from lightning_ext.optim._named_schedules import (
    SampleCosine,
    SampleLinear,
    SampleOneCycle,
    SampleWarmup,
    SampleWSD,
)
from lightning_ext.optim._refined_schedule import RefinedSchedule
from lightning_ext.optim._sample_schedule import SampleSchedule, sample_schedules
from lightning_ext.optim._weight_decay_schedule import WeightDecaySchedule

__all__ = [
    "BatchScaling",
    "LEGWWarmup",
    "PowerScheduler",
    "RefinedSchedule",
    "SampleCosine",
    "SampleLinear",
    "SampleOneCycle",
    "SampleSchedule",
    "SampleWSD",
    "SampleWarmup",
    "WeightDecaySchedule",
    "batch_rule",
    "sample_schedules",
]
