"""Numbers in, numbers out: rules and laws for learning rate, betas, EMA and batch size."""

from lightning_ext.scaling._batch_rule import (
    ESTIMATED_FIELDS,
    BatchRule,
    InnerProducts,
    Observation,
    Proposal,
)
from lightning_ext.scaling._controller import BatchSplit, next_global_batch, split_global_batch
from lightning_ext.scaling._decay_rules import GeoDamp, PadaDamp, Seesaw
from lightning_ext.scaling._ema import (
    decay_to_half_life,
    ema_decay,
    ema_warmup,
    half_life_to_decay,
)
from lightning_ext.scaling._goodput import GoodputRule, StepTime
from lightning_ext.scaling._gradient_tests import (
    COORDINATE_FRACTIONS,
    AugmentedTest,
    CoordinateTest,
    InnerProductTest,
    NormTest,
)
from lightning_ext.scaling._hyperparameters import (
    HYPERPARAMETER_RULES,
    Hyperparameters,
    momentum_buffer_scale,
    scale_hyperparameters,
    scale_step_count,
)
from lightning_ext.scaling._inner_products import inner_product_variance, mean_inner_products
from lightning_ext.scaling._loss_rules import AdaDamp, CriticalBatchLaw, RadaDamp
from lightning_ext.scaling._lr_factors import (
    NOISE_RULES,
    SATURATING_RULES,
    adascale_gain,
    legw_warmup,
)
from lightning_ext.scaling._lr_schedules import (
    cosine_factor,
    linear_factor,
    one_cycle_factor,
    one_cycle_momentum,
    regime_adaptation,
    warmup_factor,
    wsd_factor,
)
from lightning_ext.scaling._means import loss_weight
from lightning_ext.scaling._memory_model import MemoryModel
from lightning_ext.scaling._micro_batch import Bracket, largest_passing, merge_ceilings
from lightning_ext.scaling._noise import (
    BatchEfficiency,
    NoiseScale,
    batch_efficiency,
    noise_scale,
    noise_statistics,
)
from lightning_ext.scaling._noise_rules import (
    DiversityRule,
    GSNRRule,
    NoiseScaleRule,
    OptimalBatchRule,
    SimilarityRule,
    supported_noise_scale,
)
from lightning_ext.scaling._parse_rule import parse_rule
from lightning_ext.scaling._power_lr import power_lr
from lightning_ext.scaling._refinement import FactorTable, refined_factors
from lightning_ext.scaling._schedule import BatchSizeSchedule

__all__ = [
    "COORDINATE_FRACTIONS",
    "ESTIMATED_FIELDS",
    "HYPERPARAMETER_RULES",
    "NOISE_RULES",
    "SATURATING_RULES",
    "AdaDamp",
    "AugmentedTest",
    "BatchEfficiency",
    "BatchRule",
    "BatchSizeSchedule",
    "BatchSplit",
    "Bracket",
    "CoordinateTest",
    "CriticalBatchLaw",
    "DiversityRule",
    "FactorTable",
    "GSNRRule",
    "GeoDamp",
    "GoodputRule",
    "Hyperparameters",
    "InnerProductTest",
    "InnerProducts",
    "MemoryModel",
    "NoiseScale",
    "NoiseScaleRule",
    "NormTest",
    "Observation",
    "OptimalBatchRule",
    "PadaDamp",
    "Proposal",
    "RadaDamp",
    "Seesaw",
    "SimilarityRule",
    "StepTime",
    "adascale_gain",
    "batch_efficiency",
    "cosine_factor",
    "decay_to_half_life",
    "ema_decay",
    "ema_warmup",
    "half_life_to_decay",
    "inner_product_variance",
    "largest_passing",
    "legw_warmup",
    "linear_factor",
    "loss_weight",
    "mean_inner_products",
    "merge_ceilings",
    "momentum_buffer_scale",
    "next_global_batch",
    "noise_scale",
    "noise_statistics",
    "one_cycle_factor",
    "one_cycle_momentum",
    "parse_rule",
    "power_lr",
    "refined_factors",
    "regime_adaptation",
    "scale_hyperparameters",
    "scale_step_count",
    "split_global_batch",
    "supported_noise_scale",
    "warmup_factor",
    "wsd_factor",
]
