"""Numbers in, numbers out: rules and laws for learning rate, betas, EMA and batch size."""

from lightning_ext.scaling._advise import ADVICE_INPUTS, LAWS, Advice, advise
from lightning_ext.scaling._agvm import agvm_factor, agvm_multipliers, half_batch_cosine
from lightning_ext.scaling._batch_rule import (
    ESTIMATED_FIELDS,
    BatchRule,
    InnerProducts,
    Observation,
    Proposal,
)
from lightning_ext.scaling._branches import (
    BranchedCriticalBatch,
    BranchedRule,
    critical_batch_from_branches,
    smooth_losses,
)
from lightning_ext.scaling._communication._memory import ShardedMemory, sharded_memory
from lightning_ext.scaling._communication._sizes import block_bytes, padded_parameters
from lightning_ext.scaling._communication._time import (
    Links,
    break_even_bandwidth,
    break_even_micro_batch,
    step_time,
)
from lightning_ext.scaling._communication._traffic import (
    COLLECTIVES,
    Traffic,
    collective_traffic,
    exchange_traffic,
)
from lightning_ext.scaling._communication._volume import CommunicationBytes, communication_bytes
from lightning_ext.scaling._controller import BatchSplit, next_global_batch, split_global_batch
from lightning_ext.scaling._critical_batch_estimate import (
    CRITICAL_BATCH_DEFINITIONS,
    CriticalBatchEstimate,
    CriticalBatchFit,
)
from lightning_ext.scaling._critical_batch_fit import fit_critical_batch
from lightning_ext.scaling._curvature import (
    BatchCurvature,
    batch_curvature,
    curvature_ratio,
    fit_batch_curvature,
    stable_lr,
)
from lightning_ext.scaling._decay_rules import GeoDamp, PadaDamp, Seesaw
from lightning_ext.scaling._diagnostics import AdamInstability, LogFit, adam_instability
from lightning_ext.scaling._ema import decay_to_half_life, ema_decay, ema_warmup, half_life_to_decay
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
from lightning_ext.scaling._laws._allocation import (
    ChinchillaLaw,
    ChinchillaRefit,
    InferenceAware,
    OverTraining,
)
from lightning_ext.scaling._laws._cost import FineTuningCost
from lightning_ext.scaling._laws._data import DataConstrained, PrecisionLaw
from lightning_ext.scaling._laws._horizon import BatchAwareScaling, TimeTransfer, TokenHorizon
from lightning_ext.scaling._laws._kaplan import KaplanLaw
from lightning_ext.scaling._laws._law import (
    Interval,
    Law,
    Meaning,
    OutOfRangeError,
    training_compute,
)
from lightning_ext.scaling._laws._lr_batch import (
    PorianLaw,
    StepLaw,
    VideoDiTLaw,
    ZhangCriticalBatch,
)
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
from lightning_ext.scaling._memory_plan import MemoryPlan
from lightning_ext.scaling._micro_batch import Bracket, largest_passing, merge_ceilings
from lightning_ext.scaling._noise import (
    BatchEfficiency,
    NoiseScale,
    batch_efficiency,
    extrapolated_limits,
    noise_scale,
    noise_statistics,
)
from lightning_ext.scaling._noise_knee import knee_from_noise
from lightning_ext.scaling._noise_rules import (
    DiversityRule,
    GSNRRule,
    NoiseScaleRule,
    OptimalBatchRule,
    SimilarityRule,
    supported_noise_scale,
)
from lightning_ext.scaling._norm_noise import (
    deviation_factor,
    norm_noise,
    norm_noise_scale,
    norm_signal,
)
from lightning_ext.scaling._parse_rule import parse_rule
from lightning_ext.scaling._partition import balanced_split
from lightning_ext.scaling._pipeline._advise import PipelinePlan, advise_pipeline
from lightning_ext.scaling._pipeline._bubble import bubble_fraction, bubble_overhead
from lightning_ext.scaling._pipeline._gathers import paper_gathers
from lightning_ext.scaling._pipeline._layout import PipelineCluster, PipelineModel
from lightning_ext.scaling._pipeline._orders import PIPELINE_SCHEDULES
from lightning_ext.scaling._pipeline._timeline import PipelineTimeline, pipeline_timeline
from lightning_ext.scaling._pipeline._timing import PipelineAction
from lightning_ext.scaling._power_lr import power_lr
from lightning_ext.scaling._refinement import FactorTable, refined_factors
from lightning_ext.scaling._schedule import BatchSizeSchedule
from lightning_ext.scaling._steps_to_target import (
    StepsToTarget,
    SweepRow,
    UntunedBatch,
    best_of_sweep,
    steps_to_target,
    untuned_batches,
)

__all__ = [
    "ADVICE_INPUTS",
    "COLLECTIVES",
    "COORDINATE_FRACTIONS",
    "CRITICAL_BATCH_DEFINITIONS",
    "ESTIMATED_FIELDS",
    "HYPERPARAMETER_RULES",
    "LAWS",
    "NOISE_RULES",
    "PIPELINE_SCHEDULES",
    "SATURATING_RULES",
    "AdaDamp",
    "AdamInstability",
    "Advice",
    "AugmentedTest",
    "BatchAwareScaling",
    "BatchCurvature",
    "BatchEfficiency",
    "BatchRule",
    "BatchSizeSchedule",
    "BatchSplit",
    "Bracket",
    "BranchedCriticalBatch",
    "BranchedRule",
    "ChinchillaLaw",
    "ChinchillaRefit",
    "CommunicationBytes",
    "CoordinateTest",
    "CriticalBatchEstimate",
    "CriticalBatchFit",
    "CriticalBatchLaw",
    "DataConstrained",
    "DiversityRule",
    "FactorTable",
    "FineTuningCost",
    "GSNRRule",
    "GeoDamp",
    "GoodputRule",
    "Hyperparameters",
    "InferenceAware",
    "InnerProductTest",
    "InnerProducts",
    "Interval",
    "KaplanLaw",
    "Law",
    "Links",
    "LogFit",
    "Meaning",
    "MemoryModel",
    "MemoryPlan",
    "NoiseScale",
    "NoiseScaleRule",
    "NormTest",
    "Observation",
    "OptimalBatchRule",
    "OutOfRangeError",
    "OverTraining",
    "PadaDamp",
    "PipelineAction",
    "PipelineCluster",
    "PipelineModel",
    "PipelinePlan",
    "PipelineTimeline",
    "PorianLaw",
    "PrecisionLaw",
    "Proposal",
    "RadaDamp",
    "Seesaw",
    "ShardedMemory",
    "SimilarityRule",
    "StepLaw",
    "StepTime",
    "StepsToTarget",
    "SweepRow",
    "TimeTransfer",
    "TokenHorizon",
    "Traffic",
    "UntunedBatch",
    "VideoDiTLaw",
    "ZhangCriticalBatch",
    "adam_instability",
    "adascale_gain",
    "advise",
    "advise_pipeline",
    "agvm_factor",
    "agvm_multipliers",
    "balanced_split",
    "batch_curvature",
    "batch_efficiency",
    "best_of_sweep",
    "block_bytes",
    "break_even_bandwidth",
    "break_even_micro_batch",
    "bubble_fraction",
    "bubble_overhead",
    "collective_traffic",
    "communication_bytes",
    "cosine_factor",
    "critical_batch_from_branches",
    "curvature_ratio",
    "decay_to_half_life",
    "deviation_factor",
    "ema_decay",
    "ema_warmup",
    "exchange_traffic",
    "extrapolated_limits",
    "fit_batch_curvature",
    "fit_critical_batch",
    "half_batch_cosine",
    "half_life_to_decay",
    "inner_product_variance",
    "knee_from_noise",
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
    "norm_noise",
    "norm_noise_scale",
    "norm_signal",
    "one_cycle_factor",
    "one_cycle_momentum",
    "padded_parameters",
    "paper_gathers",
    "parse_rule",
    "pipeline_timeline",
    "power_lr",
    "refined_factors",
    "regime_adaptation",
    "scale_hyperparameters",
    "scale_step_count",
    "sharded_memory",
    "smooth_losses",
    "split_global_batch",
    "stable_lr",
    "step_time",
    "steps_to_target",
    "supported_noise_scale",
    "training_compute",
    "untuned_batches",
    "warmup_factor",
    "wsd_factor",
]
