"""Callbacks that measure the batch, change it, and keep what depends on it consistent."""

from lightning_ext.callbacks._adaptive_batch_size import AdaptiveBatchSize
from lightning_ext.callbacks._ema import EMA
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale
from lightning_ext.callbacks._gradient_norms import GradientNormRecorder
from lightning_ext.callbacks._large_batch_recipe import LargeBatchRecipe
from lightning_ext.callbacks._micro_batch_finder import MicroBatchFinder

__all__ = [
    "EMA",
    "AdaptiveBatchSize",
    "GradientNoiseScale",
    "GradientNormRecorder",
    "LargeBatchRecipe",
    "MicroBatchFinder",
]
