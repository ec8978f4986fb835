"""Numbers in, numbers out: rules and laws for learning rate, betas, EMA and batch size."""

from lightning_ext.scaling._batch_rule import (
    ESTIMATED_FIELDS,
    BatchRule,
    InnerProducts,
    Observation,
    Proposal,
)
from lightning_ext.scaling._controller import BatchSplit, next_global_batch, split_global_batch
from lightning_ext.scaling._ema import (
    decay_to_half_life,
    ema_decay,
    ema_warmup,
    half_life_to_decay,
)
from lightning_ext.scaling._hyperparameters import (
    HYPERPARAMETER_RULES,
    Hyperparameters,
    momentum_buffer_scale,
    scale_hyperparameters,
    scale_step_count,
)
from lightning_ext.scaling._lr_factors import (
    NOISE_RULES,
    SATURATING_RULES,
    adascale_gain,
    legw_warmup,
)
from lightning_ext.scaling._means import loss_weight
from lightning_ext.scaling._noise import (
    BatchEfficiency,
    NoiseScale,
    batch_efficiency,
    noise_scale,
    noise_statistics,
)
from lightning_ext.scaling._rules import NoiseScaleRule, NormTest, parse_rule
from lightning_ext.scaling._schedule import BatchSizeSchedule

__all__ = [
    "ESTIMATED_FIELDS",
    "HYPERPARAMETER_RULES",
    "NOISE_RULES",
    "SATURATING_RULES",
    "BatchEfficiency",
    "BatchRule",
    "BatchSizeSchedule",
    "BatchSplit",
    "Hyperparameters",
    "InnerProducts",
    "NoiseScale",
    "NoiseScaleRule",
    "NormTest",
    "Observation",
    "Proposal",
    "adascale_gain",
    "batch_efficiency",
    "decay_to_half_life",
    "ema_decay",
    "ema_warmup",
    "half_life_to_decay",
    "legw_warmup",
    "loss_weight",
    "momentum_buffer_scale",
    "next_global_batch",
    "noise_scale",
    "noise_statistics",
    "parse_rule",
    "scale_hyperparameters",
    "scale_step_count",
    "split_global_batch",
]
