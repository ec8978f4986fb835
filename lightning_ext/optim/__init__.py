"""Optimizers for large batches, and what keeps any optimizer in step with its batch."""

from __future__ import annotations

from lightning_ext.optim._accum_adam import AccumAdam
from lightning_ext.optim._adagrad_norm import AdaGradNorm
from lightning_ext.optim._adamp import AdamP
from lightning_ext.optim._batch._base_optimizer import base_optimizer
from lightning_ext.optim._batch._batch_rule import batch_rule
from lightning_ext.optim._batch._batch_scaling import BatchScaling
from lightning_ext.optim._came import CAME
from lightning_ext.optim._diffgrad import DiffGrad
from lightning_ext.optim._distributed._distributed_lion import DistributedLion
from lightning_ext.optim._distributed._keep_local_gradients import keep_local_gradients
from lightning_ext.optim._gravity import Gravity
from lightning_ext.optim._groups._param_groups_for import param_groups_for
from lightning_ext.optim._groups._welore_ranks import welore_ranks
from lightning_ext.optim._lamb import LAMB
from lightning_ext.optim._lars import LARS
from lightning_ext.optim._lion import Lion
from lightning_ext.optim._low_bit_adamw import LowBitAdamW
from lightning_ext.optim._low_rank._apollo import APOLLO, APOLLOMini
from lightning_ext.optim._low_rank._fira import Fira
from lightning_ext.optim._low_rank._galore import GaLore
from lightning_ext.optim._low_rank._gradnormlorp import GradNormLoRP
from lightning_ext.optim._low_rank._qgalore import QGaLore
from lightning_ext.optim._matrix._normuon import NorMuon
from lightning_ext.optim._mt_adamw import MTAdamW
from lightning_ext.optim._offload._offloaded_states import OffloadedStates
from lightning_ext.optim._polyak_sgd import PolyakSGD
from lightning_ext.optim._schedules._batch_schedules import LEGWWarmup, PowerScheduler
from lightning_ext.optim._schedules._named_schedules import (
    SampleCosine,
    SampleLinear,
    SampleOneCycle,
    SampleWarmup,
    SampleWSD,
)
from lightning_ext.optim._schedules._refined_schedule import RefinedSchedule
from lightning_ext.optim._schedules._sample_schedule import SampleSchedule, sample_schedules
from lightning_ext.optim._schedules._weight_decay_schedule import WeightDecaySchedule
from lightning_ext.optim._second_order._egn import EGN
from lightning_ext.optim._second_order._mkor import MKOR
from lightning_ext.optim._second_order._mkorh import MKORH
from lightning_ext.optim._sgdp import SGDP
from lightning_ext.optim._wrappers._delay_compensation import DelayCompensation
from lightning_ext.optim._wrappers._lawn import LAWN
from lightning_ext.optim._wrappers._vrgd import VRGD

__all__ = [
    "APOLLO",
    "CAME",
    "EGN",
    "LAMB",
    "LARS",
    "LAWN",
    "MKOR",
    "MKORH",
    "SGDP",
    "VRGD",
    "APOLLOMini",
    "AccumAdam",
    "AdaGradNorm",
    "AdamP",
    "BatchScaling",
    "DelayCompensation",
    "DiffGrad",
    "DistributedLion",
    "Fira",
    "GaLore",
    "GradNormLoRP",
    "Gravity",
    "LEGWWarmup",
    "Lion",
    "LowBitAdamW",
    "MTAdamW",
    "NorMuon",
    "OffloadedStates",
    "PolyakSGD",
    "PowerScheduler",
    "QGaLore",
    "RefinedSchedule",
    "SampleCosine",
    "SampleLinear",
    "SampleOneCycle",
    "SampleSchedule",
    "SampleWSD",
    "SampleWarmup",
    "WeightDecaySchedule",
    "base_optimizer",
    "batch_rule",
    "keep_local_gradients",
    "param_groups_for",
    "sample_schedules",
    "welore_ranks",
]
