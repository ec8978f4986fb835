"""Callbacks that measure the batch, change it, and keep what depends on it consistent."""

from lightning_ext.callbacks._adaptive_batch_size import AdaptiveBatchSize
from lightning_ext.callbacks._ema import EMA
from lightning_ext.callbacks._gradient_noise_scale import GradientNoiseScale

__all__ = ["EMA", "AdaptiveBatchSize", "GradientNoiseScale"]
