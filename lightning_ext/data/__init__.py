"""Samplers whose batch size is read anew for every batch."""

from __future__ import annotations

from lightning_ext.data._adaptive_batch_sampler import AdaptiveBatchSampler
from lightning_ext.data._epoch_plan import EpochPlan, Share
from lightning_ext.data._seeded_permutation import SeededPermutation

__all__ = ["AdaptiveBatchSampler", "EpochPlan", "SeededPermutation", "Share"]
