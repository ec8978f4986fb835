"""Callbacks that measure the batch, change it, and keep what depends on it consistent."""

from lightning_ext.callbacks._adam_instability import AdamInstabilityMonitor
from lightning_ext.callbacks._adaptive_batch_size import AdaptiveBatchSize
from lightning_ext.callbacks._adaptive_gradient_clipping import AdaptiveGradientClipping
from lightning_ext.callbacks._agvm import AGVM
from lightning_ext.callbacks._batch_size_sweep import sweep_batch_sizes
from lightning_ext.callbacks._communication_volume import CommunicationVolume
from lightning_ext.callbacks._critical_batch_size import CriticalBatchSize
from lightning_ext.callbacks._curvature import Curvature
from lightning_ext.callbacks._ema import EMA
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.callbacks._gradient_norms import GradientNormRecorder
from lightning_ext.callbacks._large_batch_recipe import LargeBatchRecipe
from lightning_ext.callbacks._local_gradients import LocalGradients
from lightning_ext.callbacks._measure_critical_batch import measure_critical_batch
from lightning_ext.callbacks._memory_plan import memory_held, memory_plan
from lightning_ext.callbacks._micro_batch_finder import MicroBatchFinder
from lightning_ext.callbacks._norm_loss import NormLoss
from lightning_ext.callbacks._polyak_loss import PolyakLoss
from lightning_ext.callbacks._sharpness_aware import SharpnessAware
from lightning_ext.callbacks._weight_distance import WeightDistance
from lightning_ext.callbacks._wire._count import WireCount
from lightning_ext.callbacks._wire._meter import WireMeter

__all__ = [
    "AGVM",
    "EMA",
    "AdamInstabilityMonitor",
    "AdaptiveBatchSize",
    "AdaptiveGradientClipping",
    "CommunicationVolume",
    "CriticalBatchSize",
    "Curvature",
    "GradientNoiseScale",
    "GradientNormRecorder",
    "LargeBatchRecipe",
    "LocalGradients",
    "MicroBatchFinder",
    "NormLoss",
    "PolyakLoss",
    "SharpnessAware",
    "WeightDistance",
    "WireCount",
    "WireMeter",
    "measure_critical_batch",
    "memory_held",
    "memory_plan",
    "sweep_batch_sizes",
]
