"""The contract of the room: identity at ratio 1, composition, and the published number."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest

from lightning_ext import scaling
from lightning_ext.scaling import (
    COORDINATE_FRACTIONS,
    CRITICAL_BATCH_DEFINITIONS,
    HYPERPARAMETER_RULES,
    NOISE_RULES,
    AdaDamp,
    AdamInstability,
    Advice,
    AugmentedTest,
    BatchAwareScaling,
    BatchCurvature,
    BatchEfficiency,
    BatchRule,
    BatchSizeSchedule,
    BatchSplit,
    Bracket,
    BranchedCriticalBatch,
    BranchedRule,
    ChinchillaLaw,
    ChinchillaRefit,
    CommunicationBytes,
    CoordinateTest,
    CriticalBatchEstimate,
    CriticalBatchFit,
    CriticalBatchLaw,
    DataConstrained,
    DiversityRule,
    FactorTable,
    FineTuningCost,
    GeoDamp,
    GoodputRule,
    GSNRRule,
    Hyperparameters,
    InferenceAware,
    InnerProducts,
    InnerProductTest,
    Interval,
    KaplanLaw,
    Links,
    LogFit,
    Meaning,
    MemoryModel,
    MemoryPlan,
    NoiseScale,
    NoiseScaleRule,
    NormTest,
    Observation,
    OptimalBatchRule,
    OverTraining,
    PadaDamp,
    PipelineAction,
    PipelineCluster,
    PipelineModel,
    PipelinePlan,
    PipelineTimeline,
    PorianLaw,
    PrecisionLaw,
    Proposal,
    RadaDamp,
    Seesaw,
    ShardedMemory,
    SimilarityRule,
    StepLaw,
    StepsToTarget,
    StepTime,
    SweepRow,
    TimeTransfer,
    TokenHorizon,
    Traffic,
    UntunedBatch,
    VideoDiTLaw,
    ZhangCriticalBatch,
    adam_instability,
    adascale_gain,
    advise,
    advise_pipeline,
    agvm_factor,
    agvm_multipliers,
    balanced_split,
    batch_curvature,
    batch_efficiency,
    best_of_sweep,
    block_bytes,
    break_even_bandwidth,
    break_even_micro_batch,
    bubble_fraction,
    bubble_overhead,
    collective_traffic,
    communication_bytes,
    cosine_factor,
    critical_batch_from_branches,
    curvature_ratio,
    decay_to_half_life,
    deviation_factor,
    ema_decay,
    ema_warmup,
    exchange_traffic,
    extrapolated_limits,
    fit_batch_curvature,
    fit_critical_batch,
    half_batch_cosine,
    half_life_to_decay,
    inner_product_variance,
    knee_from_noise,
    largest_passing,
    legw_warmup,
    linear_factor,
    loss_weight,
    mean_inner_products,
    merge_ceilings,
    momentum_buffer_scale,
    next_global_batch,
    noise_scale,
    noise_statistics,
    norm_noise,
    norm_noise_scale,
    norm_signal,
    one_cycle_factor,
    one_cycle_momentum,
    padded_parameters,
    paper_gathers,
    parse_rule,
    pipeline_timeline,
    power_lr,
    refined_factors,
    regime_adaptation,
    scale_hyperparameters,
    scale_step_count,
    sharded_memory,
    smooth_losses,
    split_global_batch,
    stable_lr,
    step_time,
    steps_to_target,
    supported_noise_scale,
    training_compute,
    untuned_batches,
    warmup_factor,
    wsd_factor,
)

POSITION = "it is a function of the position, not of a ratio"
TABLE = FactorTable((0, 40, 100), (0.5, 1.0, 0.0))
ADAMW = Hyperparameters(1e-3, (0.9, 0.999), 0.9, 1e-8, 0.1)
KNOWN = NoiseScale(1.0, 1.0, 1.0, 1.0, 1.0, 9)
NOISE = NoiseScale(512.0, 400.0, 700.0, 2.0, 1024.0, 6400)
SEEN = Observation(64, 6400, NOISE, total_samples=100_000)
# At the noise scale, with the loss and the gradient of the beginning: most rules stay.
STEADY = Observation(
    global_batch=512,
    samples_seen=0,
    noise=NOISE,
    reference_batch=512,
    inner_products=InnerProducts(512.0, 1.0, 1.0, 1024.0),
    coordinates={0.5: 512.0, 1.0: 512.0},
    loss=2.0,
    first_loss=2.0,
    first_grad_sq_norm=2.0,
    lr_decay=1.0,
    step_seconds=float,
    max_global_batch=512,
    critical_batch=512.0,
)
MEGATRON = BatchSizeSchedule.parse("0:768 250B:1536 500B:3072", unit="tok")


def _wsd(samples: float, **kwargs: Any) -> float:
    return wsd_factor(samples, total_samples=100, warmup_samples=20, decay_samples=20, **kwargs)


# Zhang et al. 2024, 85 M parameters: steps at batches of 64 to 16,384, of the released notebook.
ZHANG_85M = [46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600]
KNEE = CriticalBatchEstimate(
    "knee", 64.0, 60.0, 70.0, {"s_min": 100.0, "e_min": 6400.0}, 0.05, -40.0, ()
)
SWEPT = SweepRow(8, 1e-3, 0, 100.0, 800.0, "reached", 5, 2.4, "val_loss", 2.5)


def _scaled(
    given: Hyperparameters, kappa: float, rule: str, reference_batch: float = 32.0
) -> Hyperparameters:
    noise = {"noise_scale": 512.0, "reference_batch": reference_batch}
    curvature = {"saturation": 64.0, "reference_batch": reference_batch}
    inputs = noise if rule in NOISE_RULES else curvature if rule == "rmt" else {}
    return scale_hyperparameters(kappa, rule=rule, **given._asdict(), **inputs)


def _numbers(values: Hyperparameters) -> list[float]:
    lr, betas, momentum, eps, weight_decay = values
    return [lr, *(betas or ()), momentum or 0, eps or 0, weight_decay or 0]


def _rules_compose() -> bool:
    return all(
        _numbers(_scaled(_scaled(ADAMW, a, rule), b, rule, 32 * a))
        == pytest.approx(_numbers(_scaled(ADAMW, a * b, rule)), rel=1e-12)
        for rule in HYPERPARAMETER_RULES
        for a, b in [(2, 4), (8, 0.25), (0.1, 3.7)]
    )


def _published_rules() -> bool:
    # Goyal et al. 2017, section 5: lr 0.1 at 256 images becomes 3.2 at 8192.
    linear = scale_hyperparameters(8192 / 256, rule="linear", lr=0.1, momentum=0.9)
    # Krizhevsky 2014: batch times k, learning rate times the root of k.
    root = scale_hyperparameters(1024 / 64, rule="sqrt", lr=0.01)
    # Malladi et al. 2022: lr·√κ, 1 − κ(1 − β), ε/√κ, to first order in 1 − β.
    sde = scale_hyperparameters(16, rule="sde", lr=1e-3, betas=(0.999, 0.9999), eps=1e-8)
    # Li et al. 2024: half the sum of two roots at B_noise/16 is 17/8, at the peak B_noise 1.
    peak = scale_hyperparameters(16, rule="surge", lr=1e-3, noise_scale=512, reference_batch=32)
    return (
        linear[:3] == (pytest.approx(3.2), None, 0.9)
        and root.lr == pytest.approx(0.04)
        and sde.lr == pytest.approx(4e-3)
        and sde.betas == pytest.approx((1 - 16e-3, 1 - 16e-4), abs=2e-4)
        and sde.eps == pytest.approx(2.5e-9)
        and peak.lr == pytest.approx(1e-3 * 17 / 8)
    )


def _schedule_is_constant_with_one_entry() -> bool:
    schedule = BatchSizeSchedule((0,), (256,))
    return {schedule.at(samples=n) for n in (0, 1, 10**15)} == {256}


def _published_schedule() -> bool:
    # The example of Megatron-LM's step schedule.
    edges = [0, 249_999_999_999, 250e9, 500e9, 9e12]
    return [MEGATRON.at(tokens=n) for n in edges] == [768, 768, 1536, 3072, 3072]


def _batch(rule: BatchRule, seen: Observation = STEADY, **changes: object) -> float:
    answer = rule.propose(replace(seen, **changes))
    assert answer is not None
    return answer.target_batch


@dataclass(frozen=True)
class Contract:
    """``composes`` is a check, or the reason in words why the function claims no composition."""

    identity: Callable[[], bool]
    published: Callable[[], bool]
    composes: Callable[[], bool] | str


LAW = "a law of sizes, not of a ratio"
SENT = CommunicationBytes(forward=Traffic(inter_bytes=2 * 10**9, inter_messages=1))
LINKS = Links(100e9, 1e9)
FP16_MODEL = 2 * 2**40


def _volume(strategy: str) -> Traffic:
    # One rank per node, as volumes of a node are stated; large blocks leave scales out.
    return communication_bytes(
        2**40, 2**12, 1, strategy, weight_bytes=2, gradient_bytes=2, block_size=2**20
    ).total


def _memory(strategy: str) -> float:
    mixed = {"weight_bytes": 2, "gradient_bytes": 2, "optimizer_bytes": 12}
    return sharded_memory(7_500_000_000, 64, 8, strategy, **mixed).total / 1e9


def _horizon(lr: float, start: float, end: float) -> float:
    return TokenHorizon().transferred_lr(
        reference_lr=lr, reference_tokens=start, params=1e9, tokens=end
    )


def _time(lr: float, tokens: float, batch: float) -> float:
    return TimeTransfer().transferred_lr(
        reference_lr=lr,
        reference_tokens=1e9,
        reference_critical_batch_tokens=1e6,
        batch_tokens=batch,
        tokens=tokens,
    )


def _batch_aware(batch: float, start: float, end: float) -> float:
    return BatchAwareScaling().transferred_batch_tokens(
        reference_batch_tokens=batch, reference_compute=start, compute=end
    )


def _served(tokens: float) -> tuple[float, float]:
    run = {"params": 13e9, "tokens": 5.76e11, "inference_tokens": tokens}
    return InferenceAware().optimal_params(**run), InferenceAware().saved_flops(**run)


ABSOLUTE = "the target does not depend on the present batch"
MEASURED = "it reads a measurement made at the present batch"
LAYERS = PipelineModel(64, 12 * 8192**2, 0.066, 2 * 8192 * 2048, 34 * 8192 * 2048)


def _gathers(schedule: str, loops: int) -> int:
    return paper_gathers(schedule, pipeline_ranks=2, stages_per_rank=loops, num_microbatches=8)


def _timeline(schedule: str, ranks: int, loops: int = 1) -> PipelineTimeline:
    return pipeline_timeline(
        schedule, pipeline_ranks=ranks, stages_per_rank=loops, num_microbatches=8
    )


def _plans(ranks: int) -> list[PipelinePlan]:
    cluster = PipelineCluster(ranks, 80e9 if ranks > 1 else 1e13, Links(250e9, 3e9))
    return advise_pipeline(LAYERS, cluster, critical_batch=64)


CONTRACTS = {
    "scale_hyperparameters": Contract(
        identity=lambda: all(_scaled(ADAMW, 1, rule) == ADAMW for rule in HYPERPARAMETER_RULES),
        published=_published_rules,
        composes=_rules_compose,
    ),
    "adascale_gain": Contract(
        identity=lambda: adascale_gain(1, noise_scale=512, reference_batch=32) == 1,
        # Johnson et al. 2020: S where σ² ≫ μ², 1 where σ² ≪ μ²; σ² = μ², S = 3 is 2/(1/3 + 1).
        published=lambda: (
            [adascale_gain(3, noise_scale=n, reference_batch=32) for n in (math.inf, 0, 32)]
            == pytest.approx([3, 1, 1.5])
        ),
        composes=lambda: (
            adascale_gain(3, noise_scale=512, reference_batch=32)
            * adascale_gain(5, noise_scale=512, reference_batch=3 * 32)
            == pytest.approx(adascale_gain(15, noise_scale=512, reference_batch=32))
        ),
    ),
    "legw_warmup": Contract(
        identity=lambda: legw_warmup(777, 1) == 777,
        # You et al. 2019: batch times k, warm-up epochs times k.
        published=lambda: legw_warmup(0.5, 8192 / 256) == 16,
        composes=lambda: legw_warmup(legw_warmup(777, 2), 8) == legw_warmup(777, 16),
    ),
    "scale_step_count": Contract(
        identity=lambda: scale_step_count(37.0, 1) == 37.0,
        # Adam's bias correction 1 − β^t (Kingma & Ba 2015, algorithm 1) is the same number.
        published=lambda: (0.999**4) ** scale_step_count(50.0, 4) == pytest.approx(0.999**50),
        composes=lambda: scale_step_count(scale_step_count(37.0, 2), 8) == scale_step_count(37, 16),
    ),
    "ema_decay": Contract(
        identity=lambda: ema_decay(0.9996, 1) == 0.9996,
        # Busbridge et al. 2023: BYOL's 0.996 at 4096 becomes 0.996^6 at 24576.
        published=lambda: ema_decay(0.996, 24576 / 4096) == pytest.approx(0.97623867),
        composes=lambda: ema_decay(ema_decay(0.99, 3), 5) == pytest.approx(ema_decay(0.99, 15)),
    ),
    "half_life_to_decay": Contract(
        identity=lambda: half_life_to_decay(512, 512) == 0.5,
        # Karras et al. 2020 (StyleGAN2-ADA): half-life of 500k images at batch 64.
        published=lambda: half_life_to_decay(500_000, 64) == pytest.approx(0.99991128),
        composes=lambda: (
            half_life_to_decay(1e6, 64 * 8)
            == pytest.approx(ema_decay(half_life_to_decay(1e6, 64), 8))
        ),
    ),
    "decay_to_half_life": Contract(
        identity=lambda: (
            decay_to_half_life(half_life_to_decay(777.0, 64), 64) == pytest.approx(777)
        ),
        # ln 2/(1 − ρ) steps to first order: 693 steps for 0.999.
        published=lambda: decay_to_half_life(0.999, 1) == pytest.approx(692.8, abs=0.05),
        composes=lambda: (
            decay_to_half_life(ema_decay(0.99, 8), 8 * 64)
            == pytest.approx(decay_to_half_life(0.99, 64))
        ),
    ),
    "ema_warmup": Contract(
        identity=lambda: ema_warmup(0.99, 10**6) == 0.99,
        # The moving average of TensorFlow's ExponentialMovingAverage starts at 1/10.
        published=lambda: [ema_warmup(0.999, t) for t in (0, 8, 80)] == [0.1, 0.5, 0.9],
        composes="it is a function of the position, not of a ratio",
    ),
    "noise_statistics": Contract(
        identity=lambda: noise_statistics([4.0, 4.0, 4.0], [2, 2, 2], 4.0) == (4.0, 0.0),
        # McCandlish et al. 2018, appendix A.1, with B_small 8 and B_big 16.
        published=lambda: (
            noise_statistics([5.0, 3.0], [8, 8], 3.0)
            == pytest.approx(((16 * 3 - 8 * 4) / (16 - 8), (4 - 3) / (1 / 8 - 1 / 16)))
        ),
        composes="an estimator of one batch; averages are taken over its results",
    ),
    "inner_product_variance": Contract(
        identity=lambda: inner_product_variance([4.0, 4.0, 4.0], [2, 1, 5]) == 0.0,
        # Bollapragada et al. 2018, equation 2.4, at single samples: the sample variance.
        published=lambda: (
            inner_product_variance([1.0, 2.0, 6.0], [1, 1, 1])
            == pytest.approx((1 + 4 + 36 - 3 * 3**2) / 2)
        ),
        composes="an estimator of one batch; averages are taken over its results",
    ),
    "mean_inner_products": Contract(
        identity=lambda: (
            mean_inner_products([InnerProducts(3.0, 1.0, 1.0, 8.0)] * 3) == (3, 1, 1, 8)
        ),
        # Hand-worked: the older measurement counts half.
        published=lambda: (
            mean_inner_products([(6.0, 3.0, 9.0, 0.0), (0.0, 0.0, 0.0, 3.0)], smoothing=0.5)
            == pytest.approx((2, 1, 3, 2))
        ),
        composes="an estimator",
    ),
    "noise_scale": Contract(
        identity=lambda: noise_scale([(2.0, 1024.0, 64)] * 3) == (512, 512, 512, 2, 1024, 192),
        # McCandlish et al. 2018, equation 2.9, with the average taken before the ratio.
        published=lambda: noise_scale([(1.0, 10.0, 8), (3.0, 50.0, 8)]).value == 15.0,
        composes="an estimator",
    ),
    "norm_noise_scale": Contract(
        identity=lambda: norm_noise_scale([(2.0, 8.0, 64)] * 3) == (16, 16, 16, 4, 64, 192),
        # arXiv:2602.03001: (‖σ‖/‖G‖)², with the averages taken before the ratio and the square.
        published=lambda: norm_noise_scale([(1.0, 10.0, 8), (3.0, 50.0, 8)]).value == 225.0,
        composes="an estimator",
    ),
    "norm_signal": Contract(
        identity=lambda: norm_signal(3.0, [3.0] * 4, [3.0] * 4, [2] * 4) == pytest.approx(3),
        # Hand-worked: the weights of two equal folds are 4, −5/2 and −1/2.
        published=lambda: norm_signal(8.0, [4.0, 8.0], [2.0, 4.0], [1, 1]) == 32 - 15 - 1.5,
        composes="an estimator of one batch; averages are taken over its results",
    ),
    "norm_noise": Contract(
        identity=lambda: norm_noise(3.0, 8, [3.0, 3.0], [4, 4]) == pytest.approx(3),
        # Quenouille 1956: 2f_n − f_(n/2) where the bias is a/n, here in n = k − 1.
        published=lambda: norm_noise(6.0, 5, [5.0, 5.0], [3, 3]) == 2 * 6 - 5,
        composes="an estimator of one batch; averages are taken over its results",
    ),
    "deviation_factor": Contract(
        identity=lambda: deviation_factor(10**6) == pytest.approx(1, abs=1e-6),
        # The constant c4 of control charts for samples of 2, 5 and 10 (ASTM STP 15D, table 27).
        published=lambda: (
            [round(deviation_factor(n), 4) for n in (2, 5, 10)] == [0.7979, 0.9400, 0.9727]
        ),
        composes="a constant of a sample size",
    ),
    "loss_weight": Contract(
        identity=lambda: loss_weight(8, 64, parts=8) == 1,
        # Two batches of 3 and 1 samples with mean losses 2 and 6: the mean of all four is 3.
        published=lambda: (
            (2 * loss_weight(3, 4, parts=2) + 6 * loss_weight(1, 4, parts=2)) / 2 == 3
        ),
        composes="it is about one step",
    ),
    "momentum_buffer_scale": Contract(
        identity=lambda: momentum_buffer_scale(0.9, 1) == 1,
        # Hand-worked: a steady gradient g makes a buffer of g/(1 − μ), then of g/(1 − μ²).
        published=lambda: momentum_buffer_scale(0.9, 2) == pytest.approx((1 / 0.19) / (1 / 0.1)),
        composes="from a to b it is the quotient of two",
    ),
    "agvm_factor": Contract(
        identity=lambda: agvm_factor(0.3, 0.3) == 1,
        # Xue et al. 2022, published code: the root of a ratio that is held between 0.5 and 10.
        published=lambda: (
            [agvm_factor(c, 1 - (1 - c) * r) for c, r in ((0.5, 0.1), (0.9, 4), (0.99, 50))]
            == pytest.approx([math.sqrt(0.5), 2, math.sqrt(10)], rel=1e-4)
        ),
        composes=lambda: (
            agvm_factor(0.9, 0.8) * agvm_factor(0.8, 0.5) == pytest.approx(agvm_factor(0.9, 0.5))
        ),
    ),
    "agvm_multipliers": Contract(
        identity=lambda: agvm_multipliers([1.0, 1.0], [9.0, 9.0], global_batch=8) == [1, 1],
        # Xue et al. 2022, published code: 0.97 of the old and 0.03 of the new, here √0.5.
        published=lambda: (
            agvm_multipliers([1.0, 2.0], [0.1, 9.0], global_batch=8)
            == pytest.approx([1, 0.97 * 2 + 0.03 * math.sqrt(0.5)])
        ),
        composes="it is a running mean of measurements, not a function of a ratio",
    ),
    "extrapolated_limits": Contract(
        identity=lambda: (
            extrapolated_limits(NoiseScale(4.0, 2.0, 8.0, 1, 4, 9), KNOWN, KNOWN)[:3]
            == pytest.approx((4, 2, 8))
        ),
        # Gauss's law for a product: relative deviations add in quadrature.
        published=lambda: (
            extrapolated_limits(
                NoiseScale(1.0, math.exp(-3), math.exp(3), 1, 1, 9),
                NoiseScale(1.0, math.exp(-4), math.exp(4), 1, 1, 9),
                KNOWN,
            )[1:3]
            == pytest.approx((math.exp(-5), math.exp(5)))
        ),
        composes="it is made of the limits of estimates, not a function of a ratio",
    ),
    "batch_efficiency": Contract(
        identity=lambda: batch_efficiency(512, 512) == (2, 2),
        # McCandlish et al. 2018, equation 2.11: (S/S_min − 1)(E/E_min − 1) = 1.
        published=lambda: all(
            math.prod(x - 1 for x in batch_efficiency(batch, 512)) == pytest.approx(1)
            for batch in (1, 64, 100_000)
        ),
        composes="it compares one batch with the extremes",
    ),
    "BatchSizeSchedule": Contract(
        identity=_schedule_is_constant_with_one_entry,
        published=_published_schedule,
        composes="it is a function of the position, not of a ratio",
    ),
    "NoiseScaleRule": Contract(
        identity=lambda: _batch(NoiseScaleRule()) == 512,
        # McCandlish et al. 2018, section 2.2: train at about the noise scale.
        published=lambda: _batch(NoiseScaleRule(0.5), SEEN) == 256,
        composes=ABSOLUTE,
    ),
    "OptimalBatchRule": Contract(
        identity=lambda: _batch(OptimalBatchRule(512.0)) == pytest.approx(512),
        # McCandlish et al. 2018, appendix D: √(r · B_noise).
        published=lambda: _batch(OptimalBatchRule(128.0)) == 256,
        composes=ABSOLUTE,
    ),
    "NormTest": Contract(
        identity=lambda: _batch(NormTest(1.0)) == 512,
        # Lau et al. 2024: S/(η²·|g_B|²), with the expected |g_B|² = 2 + 1024/64 = 18.
        published=lambda: _batch(NormTest(0.5, True), SEEN) == pytest.approx(1024 / (0.25 * 18)),
        composes="the target of the unbiased form does not depend on the present batch",
    ),
    "InnerProductTest": Contract(
        identity=lambda: _batch(InnerProductTest(1.0)) == 512,
        # Bollapragada et al. 2018: Var⟨g_i, ḡ⟩/(θ²·|ḡ|⁴) with θ = 0.9.
        published=lambda: _batch(InnerProductTest()) == pytest.approx(512 / 0.81),
        composes=MEASURED,
    ),
    "AugmentedTest": Contract(
        identity=lambda: _batch(AugmentedTest(1.0, 1.0)) == 512,
        # The same with (S − Var/|ḡ|²)/(ν²·|ḡ|²) = 512/ν², which ν = 5.84 makes the smaller.
        published=lambda: (
            _batch(AugmentedTest()) == _batch(InnerProductTest())
            and _batch(AugmentedTest(10.0)) == pytest.approx(512 / 5.84**2)
        ),
        composes=MEASURED,
    ),
    "CoordinateTest": Contract(
        identity=lambda: _batch(CoordinateTest(1.0)) == 512,
        # Lau et al. 2024: var_c/B ≤ η²·ḡ_c² for every coordinate.
        published=lambda: _batch(CoordinateTest(0.5), coordinates={0.5: 1.0, 1.0: 64.0}) == 256,
        composes=MEASURED,
    ),
    "SimilarityRule": Contract(
        identity=lambda: _batch(SimilarityRule(1 / 3)) == pytest.approx(512),
        # Qin et al. 2021: a tenth more where the halves are less alike than the target.
        published=lambda: _batch(SimilarityRule(0.5, step=0.1)) == pytest.approx(563.2),
        composes=ABSOLUTE,
    ),
    "DiversityRule": Contract(
        identity=lambda: _batch(DiversityRule(512 / 513)) == pytest.approx(512),
        # Yin et al. 2018: n orthogonal gradients bound the batch by n; their S/|G|² is n − 1.
        published=lambda: _batch(DiversityRule(), noise=NOISE._replace(value=99.0)) == 100,
        composes=ABSOLUTE,
    ),
    "GSNRRule": Contract(
        identity=lambda: _batch(GSNRRule()) == 512,
        # Liu et al. 2020: squared mean over variance; that of a mean of B samples is B times it.
        published=lambda: _batch(GSNRRule(0.25)) == 128,
        composes=ABSOLUTE,
    ),
    "CriticalBatchLaw": Contract(
        identity=lambda: _batch(CriticalBatchLaw(1.0, b_star=512.0), loss=1.0) == 512,
        # Kaplan et al. 2020, figure 10: the batch doubles for about every 13 % of the loss.
        published=lambda: (
            _batch(CriticalBatchLaw(1024.0), loss=2 * 0.87) / _batch(CriticalBatchLaw(1024.0))
            == pytest.approx(2, rel=0.04)
        ),
        composes=lambda: (
            _batch(CriticalBatchLaw(1.0), loss=6.0) / _batch(CriticalBatchLaw(1.0), loss=1.0)
            == pytest.approx(6 ** (-1 / 0.21))
        ),
    ),
    "AdaDamp": Contract(
        identity=lambda: _batch(AdaDamp()) == 512,
        # Sievert and Charles 2019: half the loss, twice the batch.
        published=lambda: _batch(AdaDamp(), loss=1.0) == 1024,
        composes="the target does not depend on the present batch, only on the first loss",
    ),
    "RadaDamp": Contract(
        identity=lambda: _batch(RadaDamp()) == 512,
        # Sievert and Charles 2019: B0 / (½ · (½ + 1)).
        published=lambda: _batch(RadaDamp(), loss=1.0) == pytest.approx(512 / 0.75),
        composes="the target does not depend on the present batch, only on the first values",
    ),
    "PadaDamp": Contract(
        identity=lambda: _batch(PadaDamp(0.1)) == 512,
        # Sievert and Charles 2019: B0 + ⌈rate · k⌉.
        published=lambda: _batch(PadaDamp(0.1), samples_seen=512 * 31) == 516,
        composes="it is a function of the position, not of a ratio",
    ),
    "GeoDamp": Contract(
        identity=lambda: _batch(GeoDamp(5.0, 1000)) == 512,
        # Smith et al. 2018, figure 1: a factor of 5 at each of the steps of the schedule.
        published=lambda: _batch(GeoDamp(5.0, 1000), samples_seen=2500) == 512 * 25,
        composes="it is a function of the position, not of a ratio",
    ),
    "Seesaw": Contract(
        identity=lambda: _batch(Seesaw()) == 512,
        # Seesaw: where the learning rate would be cut by 2, the batch doubles.
        published=lambda: [_batch(Seesaw(), lr_decay=x) for x in (0.5, 0.25)] == [1024, 2048],
        composes=lambda: (
            _batch(Seesaw(), reference_batch=1024, lr_decay=0.25)
            == _batch(Seesaw(), lr_decay=0.125)
        ),
    ),
    "GoodputRule": Contract(
        identity=lambda: _batch(GoodputRule()) == 512,
        # Qiao et al. 2021: the product of throughput and efficiency decides; with B/(φ + B) alone,
        # where steps cost the same, the largest batch has the most.
        published=lambda: (
            _batch(GoodputRule(), max_global_batch=4096, step_seconds=lambda batch: 1.0) == 4096
        ),
        composes=ABSOLUTE,
    ),
    "BranchedRule": Contract(
        identity=lambda: _batch(BranchedRule()) == 512,
        # Merrill et al. 2025, section 4.2: 1024 doubles where the critical batch exceeds 2048.
        published=lambda: (
            [_batch(BranchedRule(), global_batch=1024, critical_batch=b) for b in (2048.0, 2049.0)]
            == [1024, 2048]
        ),
        composes=MEASURED,
    ),
    "critical_batch_from_branches": Contract(
        identity=lambda: critical_batch_from_branches([8, 16], [2.0, 2.0])[:2] == (16, math.inf),
        # Merrill et al. 2025, section 3.1: the tolerance of 0.01.
        published=lambda: (
            critical_batch_from_branches([1024, 2048, 4096], [2.5, 2.5099, 2.5101])[:2]
            == (2048, 4096)
        ),
        composes="it compares the ends of branches",
    ),
    "smooth_losses": Contract(
        identity=lambda: smooth_losses([3.0, 3.0, 3.0]) == [3, 3, 3],
        # Merrill et al. 2025, section 3.1: α = 0.5, from which on the newest step counts most.
        published=lambda: smooth_losses([0.0] * 60 + [1.0])[-1] == pytest.approx(0.5),
        composes=lambda: (
            smooth_losses([3.0, 1.0, 1.0, 1.0], ratio=0.5)
            == pytest.approx(smooth_losses([2.0, 1.0]))
        ),
    ),
    "StepTime": Contract(
        identity=lambda: StepTime.fit([(8, 2, 0.25, 1)]).seconds(8, 2) == pytest.approx(0.25),
        # Qiao et al. 2021: accumulation adds forward and backward passes, one after another.
        published=lambda: StepTime(0.5, 0.25, 0.0).seconds(8, 3) == 0.5 + 3 * 0.25,
        composes="it is a model of measured times",
    ),
    "supported_noise_scale": Contract(
        identity=lambda: supported_noise_scale(NOISE) == NOISE.value,
        # Hand-worked: a ratio without an upper limit is at least its lower one.
        published=lambda: supported_noise_scale(NOISE._replace(high=math.inf)) == NOISE.low,
        composes="it chooses one of the numbers of an estimate",
    ),
    "parse_rule": Contract(
        identity=lambda: parse_rule(MEGATRON) is MEGATRON,
        published=lambda: parse_rule("0:256 1M:512") == BatchSizeSchedule((0, 10**6), (256, 512)),
        composes="it reads a name",
    ),
    "next_global_batch": Contract(
        identity=lambda: next_global_batch(96, 96.0, max_global_batch=4096) == 96,
        # Lau et al. 2024: the batch becomes max(B, ⌈T⌉), here without the damping.
        published=lambda: (
            next_global_batch(64, 300.0, max_global_batch=4096, growth=math.inf, threshold=0) == 300
        ),
        composes="the limit on one change makes two changes go farther than one",
    ),
    "split_global_batch": Contract(
        identity=lambda: (
            split_global_batch(64, data_parallel_size=1, max_micro_batch=64) == (64, 1)
        ),
        # Goyal et al. 2017: 8192 images on 256 GPUs are 32 each.
        published=lambda: (
            split_global_batch(8192, data_parallel_size=256, max_micro_batch=32) == (32, 1)
        ),
        composes="it splits one number",
    ),
    "largest_passing": Contract(
        identity=lambda: (
            largest_passing(lambda n: True, largest=64, known=Bracket(64)) == (64, None)
        ),
        # Żelasko et al. 2024: (min_oom − max_ok)/min_oom is at most 0.05.
        published=lambda: all(
            (failed - passed) / failed <= 0.05 or failed - passed == 1
            for passed, failed in (
                largest_passing(lambda n, limit=limit: n <= limit, start=32, largest=10**6)
                for limit in (1, 33, 1000, 77_777)
            )
        ),
        composes=lambda: (
            largest_passing(
                lambda n: n <= 99,
                largest=512,
                known=largest_passing(lambda n: n <= 99, largest=64),
            )
            == largest_passing(lambda n: n <= 99, largest=512)
        ),
    ),
    "merge_ceilings": Contract(
        identity=lambda: merge_ceilings({128: 32, 256: 16}) == {128: 32, 256: 16},
        # Żelasko et al. 2024: neighbouring buckets with equal batch sizes become one.
        published=lambda: merge_ceilings({128: 32, 256: 32, 512: 8}) == {256: 32, 512: 8},
        composes="it is a table; merging it again changes nothing",
    ),
    "warmup_factor": Contract(
        identity=lambda: {warmup_factor(n, warmup_samples=0) for n in (0, 1, 10**9)} == {1.0},
        # Goyal et al. 2017, section 2.2: from 0.1 to 3.2 in five epochs, here at half of them.
        published=lambda: (
            3.2 * warmup_factor(2.5, warmup_samples=5, start=1 / 32) == pytest.approx(1.65)
        ),
        composes=POSITION,
    ),
    "cosine_factor": Contract(
        identity=lambda: {cosine_factor(n, total_samples=9, final=1) for n in (0, 5, 9)} == {1.0},
        # Loshchilov & Hutter 2017, equation 5: the mean of both ends at half the period.
        published=lambda: cosine_factor(50, total_samples=100, final=0.1) == pytest.approx(0.55),
        composes=POSITION,
    ),
    "linear_factor": Contract(
        identity=lambda: {linear_factor(n, total_samples=9, final=1) for n in (0, 5, 9)} == {1.0},
        # Defazio et al. 2023: 1 − t/T.
        published=lambda: linear_factor(37, total_samples=100) == pytest.approx(1 - 0.37),
        composes=POSITION,
    ),
    "wsd_factor": Contract(
        identity=lambda: {_wsd(n, final=1.0) for n in (20, 90, 100, 101)} == {1.0},
        # Hägele et al. 2024: 1 − √x over the last fifth of the run.
        published=lambda: (
            [_wsd(n, shape="sqrt") for n in (80, 85, 100)] == pytest.approx([1, 0.5, 0])
        ),
        composes=POSITION,
    ),
    "one_cycle_factor": Contract(
        identity=lambda: (
            {one_cycle_factor(n, total_samples=9, start=1, final=1) for n in range(11)} == {1.0}
        ),
        # Smith & Topin 2018: from a tenth of the peak to the peak, then far below the start.
        published=lambda: (
            [one_cycle_factor(n, total_samples=100, start=0.1) for n in (0, 30, 100)]
            == pytest.approx([0.1, 1, 1e-4])
        ),
        composes=POSITION,
    ),
    "one_cycle_momentum": Contract(
        identity=lambda: (
            {one_cycle_momentum(n, total_samples=9, low=0.9, high=0.9) for n in range(11)} == {0.9}
        ),
        # Smith 2018, arXiv:1803.09820: 0.95 → 0.85 → 0.95.
        published=lambda: (
            [one_cycle_momentum(n, total_samples=100) for n in (0, 30, 100)] == [0.95, 0.85, 0.95]
        ),
        composes=POSITION,
    ),
    "power_lr": Contract(
        identity=lambda: power_lr(1e9, global_batch=1, a=0.01, b=0) == 0.01,
        # Shen et al. 2024, section 3.2: 0.0011 for 10 trillion tokens at batch 1024, with a = 4.6.
        published=lambda: round(power_lr(10e12, global_batch=1024, a=4.6), 4) == 0.0011,
        composes="it is a law of tokens and batch, not of a ratio",
    ),
    "refined_factors": Contract(
        identity=lambda: refined_factors([2.0, 2.0]) == [1.0, 0.0],
        # Defazio et al. 2023: equal norms give the linear decay.
        published=lambda: (
            refined_factors([0.3] * 101) == pytest.approx([1 - t / 100 for t in range(101)])
        ),
        composes=POSITION,
    ),
    "FactorTable": Contract(
        identity=lambda: [TABLE.at(n, total_samples=100) for n in (0, 40, 100)] == [0.5, 1, 0],
        # Hand-worked: at twice the length, half way up the first line.
        published=lambda: TABLE.at(40, total_samples=200) == pytest.approx(0.75),
        composes=POSITION,
    ),
    "fit_critical_batch": Contract(
        # A table without noise: the batch that it was made with.
        identity=lambda: (
            fit_critical_batch([(b, 1 + 64 / b) for b in (8, 32, 128, 512)], exponent=1).knee.value
            == pytest.approx(64)
        ),
        # Zhang et al. 2024: 745.32 sequences at 85 M parameters.
        published=lambda: (
            fit_critical_batch(
                [(2**k, steps) for k, steps in enumerate(ZHANG_85M, start=6)],
                exponent=1,
                reference_batch=256,
            ).overhead.value
            == pytest.approx(745.32, abs=0.01)
        ),
        composes="it reads a table of batches",
    ),
    "knee_from_noise": Contract(
        identity=lambda: knee_from_noise([48.0, 48.0], 16) == pytest.approx(48),
        # McCandlish et al. 2018: of a step at B = B_noise half the progress is left, so that one
        # at 16 and one at 48 weigh 1/2 and 1/4.
        published=lambda: knee_from_noise([16.0, 48.0], 16) == pytest.approx((8 + 12) / 0.75),
        composes="it is a mean over a run",
    ),
    "steps_to_target": Contract(
        identity=lambda: steps_to_target([(100, 2.0)], 2.0) == 100,
        # Hand-worked: half way between 100 and 400 steps in logarithms.
        published=lambda: steps_to_target([(100, 3.0), (400, 2.0)], 2.5) == pytest.approx(200),
        composes="it reads one run",
    ),
    "best_of_sweep": Contract(
        identity=lambda: best_of_sweep([SWEPT])[0].steps == pytest.approx(100),
        # Shallue et al. 2019: of the tried learning rates the one with fewest steps.
        published=lambda: (
            best_of_sweep([SWEPT, SWEPT._replace(lr=2e-3, steps=70.0)])[0].steps
            == pytest.approx(70)
        ),
        composes="it reads a table of runs",
    ),
    "untuned_batches": Contract(
        identity=lambda: untuned_batches([StepsToTarget(8, 100)]) == (),
        # Shallue et al. 2019: steps never rise with the batch where all are tuned.
        published=lambda: (
            [batch for batch, _ in untuned_batches([StepsToTarget(8, 100), StepsToTarget(16, 120)])]
            == [16]
        ),
        composes="it reads a table of batches",
    ),
    "batch_curvature": Contract(
        # All samples of the data set: no noise is left.
        identity=lambda: batch_curvature(96, largest=3.0, saturation=64.0, num_samples=96) == 3.0,
        # Granziol et al. 2022 with P = 100, σ = 0.8, λ₁ = 2: λ₁ + P·σ²/(b·λ₁), else 2σ√(P/b).
        published=lambda: (
            [batch_curvature(b, largest=2.0, saturation=16.0) for b in (32, 4)]
            == pytest.approx([2 + 100 * 0.64 / (32 * 2), 2 * 0.8 * math.sqrt(100 / 4)])
        ),
        composes="it is a function of the batch, not of a ratio",
    ),
    "curvature_ratio": Contract(
        identity=lambda: curvature_ratio(1, reference_batch=32, saturation=64) == 1,
        # Hand-worked: from b₀/2, where λ is 2√2·λ₁, to 2·b₀, where it is 1.5·λ₁.
        published=lambda: (
            curvature_ratio(4, reference_batch=32, saturation=64)
            == pytest.approx(2 * math.sqrt(2) / 1.5)
        ),
        composes=lambda: (
            curvature_ratio(3, reference_batch=32, saturation=64)
            * curvature_ratio(5, reference_batch=96, saturation=64)
            == pytest.approx(curvature_ratio(15, reference_batch=32, saturation=64))
        ),
    ),
    "stable_lr": Contract(
        identity=lambda: stable_lr(2.0) == 1.0,
        # Cohen et al. 2022: 38/η for Adam with β₁ = 0.9.
        published=lambda: stable_lr(38.0, momentum=0.9, dampening=0.9) == pytest.approx(1.0),
        composes="it is a limit at one batch; curvature_ratio compares two",
    ),
    "fit_batch_curvature": Contract(
        identity=lambda: fit_batch_curvature([(1, 3.0), (8, 3.0)]) == BatchCurvature(3.0, 0.0),
        # The law's own line: 2·λ₁ at b₀, 1.25·λ₁ at 4·b₀.
        published=lambda: (
            fit_batch_curvature([(64, 6.0), (256, 3.75)]) == BatchCurvature(3.0, 64.0)
        ),
        composes="it is an estimator",
    ),
    "adam_instability": Contract(
        identity=lambda: (
            adam_instability([9, 9, 9.0, 9.0, 9.0, 9.0], eps=1.0) == (1.0, 1.0, 1.0, 1.0)
        ),
        # Molybog et al. 2023: entries at ±1 that have nothing to do with the gradient.
        published=lambda: adam_instability([9, 9, 9.0, 0.0, 9.0, 9.0], eps=9.0)[:3] == (1, 1, 0),
        composes="sums are added before it",
    ),
    "half_batch_cosine": Contract(
        identity=lambda: half_batch_cosine(64, 0.0) == 1,
        # Hand-worked: at the noise scale two halves have |G|² + 2|G|² each, and |G|² in common.
        published=lambda: half_batch_cosine(512, 512.0) == pytest.approx(1 / 3),
        composes="it compares a batch with a noise scale",
    ),
    "regime_adaptation": Contract(
        identity=lambda: (
            regime_adaptation([81, 122], global_batch=64, reference_batch=64) == (81, 122)
        ),
        # Hoffer et al. 2017: from 128 to 4096, 32 times as many epochs.
        published=lambda: (
            regime_adaptation([200], global_batch=4096, reference_batch=128) == (6400,)
        ),
        composes="it rounds every ratio up to a whole one",
    ),
    "training_compute": Contract(
        identity=lambda: training_compute(params=1, tokens=1) == 6,
        # Hoffmann et al. 2022: Chinchilla, 70B on 1.4T tokens, 5.88e23 FLOPs.
        published=lambda: training_compute(params=70e9, tokens=1.4e12) == pytest.approx(5.88e23),
        composes=LAW,
    ),
    "StepLaw": Contract(
        identity=lambda: StepLaw(3.0, 0.0, 0.0).lr(params=1e9, tokens=1e10) == 3,
        # Li et al. 2025: 1.79·N^−0.713·D^0.307, 0.58·D^0.571.
        published=lambda: (
            [StepLaw().lr(params=1e9, tokens=1e11), StepLaw().batch_tokens(tokens=1e11)]
            == pytest.approx([1.63e-3, 1.108e6], rel=2e-3)
        ),
        composes=LAW,
    ),
    "PorianLaw": Contract(
        identity=lambda: PorianLaw(1e8, 0.5).lr(params=1e8) == 0.5,
        # Porian et al. 2024: the fits at the size that they are written around.
        published=lambda: (
            (PorianLaw().lr(params=1.08e8), PorianLaw().batch_tokens(params=1.08e8))
            == (0.0047, 160 * 2048)
        ),
        composes=LAW,
    ),
    "KaplanLaw": Contract(
        identity=lambda: KaplanLaw().critical_batch_tokens(loss=1.0) == 2e8,
        # Kaplan et al. 2020, section 6.1: 1.3e9 parameters for one PF-day.
        published=lambda: KaplanLaw().optimal_params(compute=8.64e19) == pytest.approx(1.3e9),
        composes=LAW,
    ),
    "ZhangCriticalBatch": Contract(
        identity=lambda: (
            ZhangCriticalBatch(chinchilla_exponent=0).critical_batch_tokens(params=1e9)
            == 512 * 93.2
        ),
        # Zhang et al. 2024, the released fit: 745 sequences at 85M.
        published=lambda: (
            round(ZhangCriticalBatch().critical_batch_tokens(params=85e6) / 512) == 745
        ),
        composes=LAW,
    ),
    "VideoDiTLaw": Contract(
        identity=lambda: VideoDiTLaw().lr(params=1e9, tokens=1e9) == 0.0002,
        # Yin et al. 2024: batches grow fast with tokens, D^0.808.
        published=lambda: (
            VideoDiTLaw().batch_tokens(params=1e9, tokens=1e10)
            == pytest.approx(2.1797e4 * 10**0.808)
        ),
        composes=LAW,
    ),
    "TokenHorizon": Contract(
        identity=lambda: _horizon(1.0, 1e11, 1e11) == 1,
        # Bjorck et al. 2024: the rule of thumb, D^−0.32.
        published=lambda: _horizon(1.0, 1e11, 8e11) == pytest.approx(8**-0.32),
        composes=lambda: (
            _horizon(_horizon(1.0, 3e10, 1e11), 1e11, 8e11)
            == pytest.approx(_horizon(1.0, 3e10, 8e11))
        ),
    ),
    "TimeTransfer": Contract(
        identity=lambda: _time(1.0, 1e9, 1e6) == 1,
        # Filatov et al. 2024: 1/√D far below the critical batch, √D far above.
        published=lambda: (
            [_time(1.0, 4e9, 1e-3), _time(1.0, 4e9, 1e15)] == pytest.approx([0.5, 2], rel=1e-3)
        ),
        composes="a second change starts at another critical batch",
    ),
    "BatchAwareScaling": Contract(
        identity=lambda: _batch_aware(1.0, 1e20, 1e20) == 1,
        # Shuai et al. 2024: the exponents of steps and batch multiply to that of tokens.
        published=lambda: (
            BatchAwareScaling().steps_exponent + BatchAwareScaling().batch_exponent
            == pytest.approx(0.536)
        ),
        composes=lambda: (
            _batch_aware(_batch_aware(1.0, 1e19, 1e20), 1e20, 1e21)
            == pytest.approx(_batch_aware(1.0, 1e19, 1e21))
        ),
    ),
    "ChinchillaLaw": Contract(
        identity=lambda: (
            ChinchillaLaw(0.0, 1.0, 1.0, 0.5, 0.5).optimal_params(compute=6e20) == 1e10
        ),
        # Hoffmann et al. 2022, section 3.4: 40 billion parameters at Gopher's budget.
        published=lambda: round(ChinchillaLaw().optimal_params(compute=5.76e23), -9) == 40e9,
        composes=LAW,
    ),
    "ChinchillaRefit": Contract(
        identity=lambda: issubclass(ChinchillaRefit, ChinchillaLaw),
        # Besiroglu et al. 2024: about 20 tokens per parameter, as Chinchilla was trained.
        published=lambda: (
            ChinchillaRefit().optimal_params(compute=5.76e23) == pytest.approx(70e9, rel=0.04)
        ),
        composes=LAW,
    ),
    "InferenceAware": Contract(
        # Nothing is served: the training optimum.
        identity=lambda: _served(1.0)[0] == pytest.approx(13e9, rel=0.01),
        # Sardana & Frankle 2024: 7B instead of 13B for 2T tokens, 1.7e22 FLOPs less.
        published=lambda: _served(2e12) == pytest.approx((7.0e9, 1.7e22), rel=0.01),
        composes=LAW,
    ),
    "OverTraining": Contract(
        identity=lambda: (
            OverTraining(1.0, 2.0, 3.0, 0.0).loss(params=1e9, tokens=1e11) == 1 + 2 + 3
        ),
        # Gadre et al. 2024: Chinchilla's form, with A = a·6^−η, B = b·6^−η and α = β = 2η.
        published=lambda: (
            OverTraining(1.8, 500 * 6**0.17, 400 * 6**0.17, 0.17).loss(params=1e9, tokens=1e11)
            == pytest.approx(ChinchillaLaw(1.8, 500, 400, 0.34, 0.34).loss(params=1e9, tokens=1e11))
        ),
        composes=LAW,
    ),
    "DataConstrained": Contract(
        identity=lambda: DataConstrained().effective_tokens(tokens=1e9, unique_tokens=1e9) == 1e9,
        # Muennighoff et al. 2023, section 3.1: R* repetitions are worth 1 − 1/e of fresh tokens.
        published=lambda: (
            DataConstrained().effective_tokens(tokens=16.387756e9, unique_tokens=1e9)
            == pytest.approx(1e9 * (1 + 15.387756 * (1 - 1 / math.e)))
        ),
        composes=LAW,
    ),
    "PrecisionLaw": Contract(
        identity=lambda: (
            PrecisionLaw(weight_bits_scale=0.1).effective_params(params=1e9, weight_bits=16) == 1e9
        ),
        # Kumar et al. 2024, appendix K: with γ_w = 2.6745, 4 bits are worth 77.6 %.
        published=lambda: (
            PrecisionLaw().effective_params(params=1e9, weight_bits=4)
            == pytest.approx(0.776e9, rel=1e-3)
        ),
        composes=LAW,
    ),
    "FineTuningCost": Contract(
        identity=lambda: FineTuningCost(2.0, 4.0, 3.0).samples_per_second(micro_batch=4) == 3,
        # Xia et al. 2024: the throughput grows with the logarithm of the batch.
        published=lambda: (
            FineTuningCost(2.0, 4.0, 3.0, 0.25).samples_per_second(micro_batch=math.e)
            == pytest.approx(5)
        ),
        composes=LAW,
    ),
    "advise": Contract(
        identity=lambda: advise(params=1e9, tokens=1e11, laws=[]) == [],
        # Li et al. 2025.
        published=lambda: (
            [row.value for row in advise(params=1e9, tokens=1e11, laws=["step_law"])]
            == pytest.approx([1.63e-3, 1.108e6], rel=2e-3)
        ),
        composes="it asks the laws",
    ),
    "collective_traffic": Contract(
        identity=lambda: collective_traffic("all_gather", 96, size=1, local=1) == Traffic(),
        # Rajbhandari et al. 2020, section 7.1: an all-reduce moves what a reduce-scatter and an
        # all-gather of the parts move.
        published=lambda: (
            collective_traffic("all_reduce", 96, size=4, local=2)
            == collective_traffic("reduce_scatter", 96, size=4, local=2)
            + collective_traffic("all_gather", 96 // 4, size=4, local=2)
        ),
        composes="it counts one collective",
    ),
    "exchange_traffic": Contract(
        identity=lambda: exchange_traffic([96], rank=0, local_ranks={0}) == Traffic(),
        # Parts of one size are an all-to-all.
        published=lambda: (
            exchange_traffic([24] * 4, rank=1, local_ranks={0, 1})
            == collective_traffic("all_to_all", 96, size=4, local=2)
        ),
        composes="it counts one exchange",
    ),
    "communication_bytes": Contract(
        identity=lambda: communication_bytes(96, 1, 1, "zeropp") == CommunicationBytes(),
        # Wang et al. 2023, section 4: 0.75 M between nodes in place of 3 M, scales aside.
        published=lambda: (
            [_volume("fsdp2").inter_bytes, _volume("zeropp").inter_bytes]
            == pytest.approx([3 * FP16_MODEL, 0.75 * FP16_MODEL], rel=1e-3)
        ),
        composes="it counts one step",
    ),
    "padded_parameters": Contract(
        identity=lambda: padded_parameters([(5, 3), (5,)], 1) == 20,
        # Hand-worked: 5 rows on 4 ranks are 2 on each.
        published=lambda: padded_parameters([(5, 3)], 4) == 4 * 2 * 3,
        composes="it rounds up",
    ),
    "block_bytes": Contract(
        identity=lambda: block_bytes(96, bits=8, block_size=32, scale_bytes=0) == 96,
        # Hand-worked: 7 codes of 4 bits in 4 bytes, in two blocks with a float32 each.
        published=lambda: block_bytes(7, bits=4, block_size=4) == 4 + 2 * 4,
        composes="it rounds up",
    ),
    "sharded_memory": Contract(
        identity=lambda: sharded_memory(10, 1, 1, "zero3") == sharded_memory(10, 1, 1, "ddp"),
        # Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 ranks, in GB.
        published=lambda: (
            [_memory(stage) for stage in ("ddp", "zero1", "zero2", "zero3")]
            == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
        ),
        composes="it divides by a number of ranks",
    ),
    "step_time": Contract(
        identity=lambda: step_time(CommunicationBytes(), LINKS, 1.5) == pytest.approx(1.5),
        # Hand-worked: 2 s behind 1 s of forward, and 2 s of backward in which nothing is sent.
        published=lambda: step_time(SENT, LINKS, 3.0) == pytest.approx(2 + 2),
        composes="phases are added",
    ),
    "break_even_bandwidth": Contract(
        identity=lambda: break_even_bandwidth(CommunicationBytes(), 1.5) == 0,
        # Hand-worked: 2 GB behind a forward pass of 1 s.
        published=lambda: break_even_bandwidth(SENT, 3.0) == pytest.approx(2e9),
        composes="it is a limit",
    ),
    "break_even_micro_batch": Contract(
        identity=lambda: break_even_micro_batch(CommunicationBytes(), LINKS, 1.5) == 0,
        # Hand-worked: 2 s behind a third of 1.5 s for each sample.
        published=lambda: break_even_micro_batch(SENT, LINKS, 1.5) == pytest.approx(4),
        composes="it is a limit",
    ),
    "bubble_fraction": Contract(
        identity=lambda: bubble_fraction(1, 8) == 0,
        # Huang et al. 2019, section 2.3: (K − 1)/(M + K − 1), small from M = 4K on.
        published=lambda: bubble_fraction(8, 32) == 7 / 39,
        composes="it is a limit",
    ),
    "bubble_overhead": Contract(
        identity=lambda: bubble_overhead(1, 8) == 0,
        # Narayanan et al. 2021, section 2.2: (p − 1)/m, over v with v stages on a rank.
        published=lambda: bubble_overhead(4, 8, 2) == 3 / 8 / 2,
        composes="it is a limit",
    ),
    "paper_gathers": Contract(
        identity=lambda: _gathers("breadth_first", 1) == _gathers("gpipe", 1) == 2,
        # Lamy-Poirier 2023: breadth-first gathers each stage once in a pass.
        published=lambda: _gathers("breadth_first", 4) == 2 * 4,
        composes="it counts one batch",
    ),
    "balanced_split": Contract(
        identity=lambda: balanced_split([3.0, 1.0, 2.0], 1) == [0],
        # Skiena 2008 (The Algorithm Design Manual, section 8.5): 1 to 9 in three parts.
        published=lambda: balanced_split(range(1, 10), 3) == [0, 5, 7],
        composes="it cuts once",
    ),
    "pipeline_timeline": Contract(
        identity=lambda: _timeline("gpipe", 1).total_ms == 8 * (1 + 2),
        # Lamy-Poirier 2023: stages on a rank divide the bubble; the formula of the paper.
        published=lambda: (
            _timeline("breadth_first", 4, 2).bubble_fraction
            == pytest.approx(bubble_fraction(4, 8, 2))
        ),
        composes="it times one batch",
    ),
    "advise_pipeline": Contract(
        identity=lambda: [plan.pipeline_ranks for plan in _plans(1)] == [1, 1],
        # Lamy-Poirier 2023: on slow links and with small batches breadth-first is fastest.
        published=lambda: _plans(64)[0].schedule == "breadth_first",
        composes="it chooses among layouts",
    ),
}

RECORDS = {
    "Advice": Advice("step_law", "lr", 1e-3, "", "", "", ""),
    "Interval": Interval("params", 1e8, 1e9),
    "Meaning": Meaning("tokens"),
    "AdamInstability": AdamInstability(0.25, 1.0, 0.5, 100.0),
    "BatchCurvature": BatchCurvature(3.0, 64.0),
    "LogFit": LogFit().add(1, 3.0).add(2, 4.0),
    "CriticalBatchEstimate": KNEE,
    "CriticalBatchFit": CriticalBatchFit(KNEE, KNEE, KNEE, "knee", "one of three", ()),
    "StepsToTarget": StepsToTarget(8, 100.0),
    "SweepRow": SWEPT,
    "UntunedBatch": UntunedBatch(8, "10% more steps than the smaller batch 4"),
    "BatchEfficiency": BatchEfficiency(2.0, 2.0),
    "BatchSplit": BatchSplit(32, 4),
    "Bracket": Bracket(16, 32),
    "BranchedCriticalBatch": BranchedCriticalBatch(8.0, 16.0, (8.0, 16.0), (2.0, 3.0)),
    "Hyperparameters": ADAMW,
    "InnerProducts": InnerProducts(32.0, 4.0, 16.0, 64.0),
    "MemoryModel": MemoryModel(1e9, 1e6, 2e3),
    "MemoryPlan": MemoryPlan("fsdp2", 8, 16, 4.0, 4.0, 8.0, 100.0),
    "NoiseScale": NOISE,
    "Observation": SEEN,
    "Proposal": Proposal(512.0, 512.0, "noise scale"),
    "CommunicationBytes": CommunicationBytes(forward=Traffic(100, 200, 1, 2)),
    "Links": Links(100e9, 10e9),
    "ShardedMemory": ShardedMemory(1.0, 1.0, 2.0),
    "Traffic": Traffic(100, 200, 1, 2),
    "PipelineAction": PipelineAction(0, 0, "forward", 0, 0.0, 1.0),
    "PipelineCluster": PipelineCluster(64, 80e9, LINKS),
    "PipelineModel": LAYERS,
    "PipelinePlan": PipelinePlan("gpipe", "ddp", 2, 1, 1, 1, 2, False, 3.0, 2.0, 3.0, 1e9, 1e6),
    "PipelineTimeline": pipeline_timeline("1f1b", pipeline_ranks=2, num_microbatches=2),
}
PROTOCOLS = {"BatchRule", "Law"}
NAMES = {
    "ADVICE_INPUTS",
    "LAWS",
    "COLLECTIVES",
    "OutOfRangeError",
    "COORDINATE_FRACTIONS",
    "CRITICAL_BATCH_DEFINITIONS",
    "ESTIMATED_FIELDS",
    "HYPERPARAMETER_RULES",
    "NOISE_RULES",
    "PIPELINE_SCHEDULES",
    "SATURATING_RULES",
}

functions = pytest.mark.parametrize(
    "name", [name for name in scaling.__all__ if name not in RECORDS.keys() | PROTOCOLS | NAMES]
)


def test_every_public_name_has_a_contract() -> None:
    assert set(scaling.__all__) == CONTRACTS.keys() | RECORDS.keys() | PROTOCOLS | NAMES


def test_every_listed_rule_can_be_applied() -> None:
    for rule in HYPERPARAMETER_RULES:
        assert _scaled(ADAMW, 1.0, rule).lr == ADAMW.lr
    assert set(HYPERPARAMETER_RULES) > {*NOISE_RULES, *scaling.SATURATING_RULES}


@functions
def test_identity_at_ratio_1(name: str) -> None:
    assert CONTRACTS[name].identity()


@functions
def test_published_number(name: str) -> None:
    assert CONTRACTS[name].published()


@pytest.mark.parametrize("name", [n for n, c in CONTRACTS.items() if callable(c.composes)])
def test_two_changes_equal_one(name: str) -> None:
    check = CONTRACTS[name].composes
    assert callable(check)
    assert check()


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_frozen_and_survives_pickling(name: str) -> None:
    record = RECORDS[name]
    field = next(iter(type(record).__annotations__))
    with pytest.raises((AttributeError, FrozenInstanceError)):
        setattr(record, field, 0)
    assert pickle.loads(pickle.dumps(record)) == record


def test_each_definition_of_the_critical_batch_is_explained() -> None:
    assert set(CRITICAL_BATCH_DEFINITIONS) == {*CriticalBatchFit._fields[:3]}


def test_the_fractions_of_coordinates_go_up_to_all() -> None:
    assert tuple(sorted(COORDINATE_FRACTIONS)) == COORDINATE_FRACTIONS
    assert [CoordinateTest(fraction=f).fraction for f in COORDINATE_FRACTIONS][-1] == 1


@pytest.mark.parametrize("rule", [NoiseScaleRule(), NormTest(), MEGATRON], ids=repr)
def test_a_rule_meets_the_protocol_and_survives_pickling(rule: BatchRule) -> None:
    assert isinstance(rule, BatchRule)
    assert pickle.loads(pickle.dumps(rule)) == rule
