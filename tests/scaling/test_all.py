"""The contract of the room: identity at ratio 1, composition, and the published number."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass

import pytest

from lightning_ext import scaling
from lightning_ext.scaling import (
    BatchEfficiency,
    BatchRule,
    BatchSizeSchedule,
    BatchSplit,
    Hyperparameters,
    InnerProducts,
    NoiseScale,
    NoiseScaleRule,
    NormTest,
    Observation,
    Proposal,
    batch_efficiency,
    decay_to_half_life,
    ema_decay,
    ema_warmup,
    half_life_to_decay,
    loss_weight,
    momentum_buffer_scale,
    next_global_batch,
    noise_scale,
    noise_statistics,
    parse_rule,
    scale_hyperparameters,
    scale_step_count,
    split_global_batch,
)

RULES = ["none", "linear", "linear_samples", "sqrt", "sde"]
ADAMW = Hyperparameters(1e-3, (0.9, 0.999), 0.9, 1e-8, 0.1)
NOISE = NoiseScale(512.0, 400.0, 700.0, 2.0, 1024.0, 6400)
SEEN = Observation(64, 6400, NOISE, total_samples=100_000)
MEGATRON = BatchSizeSchedule.parse("0:768 250B:1536 500B:3072", unit="tok")


def _scaled(given: Hyperparameters, kappa: float, rule: str) -> Hyperparameters:
    return scale_hyperparameters(kappa, rule=rule, **given._asdict())


def _numbers(values: Hyperparameters) -> list[float]:
    lr, betas, momentum, eps, weight_decay = values
    return [lr, *(betas or ()), momentum or 0, eps or 0, weight_decay or 0]


def _rules_compose() -> bool:
    return all(
        _numbers(_scaled(_scaled(ADAMW, a, rule), b, rule))
        == pytest.approx(_numbers(_scaled(ADAMW, a * b, rule)), rel=1e-12)
        for rule in RULES
        for a, b in [(2, 4), (8, 0.25), (0.1, 3.7)]
    )


def _published_rules() -> bool:
    # Goyal et al. 2017, section 5: lr 0.1 at 256 images becomes 3.2 at 8192.
    linear = scale_hyperparameters(8192 / 256, rule="linear", lr=0.1, momentum=0.9)
    # Krizhevsky 2014: batch times k, learning rate times the root of k.
    root = scale_hyperparameters(1024 / 64, rule="sqrt", lr=0.01)
    # Malladi et al. 2022: lr·√κ, 1 − κ(1 − β), ε/√κ, to first order in 1 − β.
    sde = scale_hyperparameters(16, rule="sde", lr=1e-3, betas=(0.999, 0.9999), eps=1e-8)
    return (
        linear[:3] == (pytest.approx(3.2), None, 0.9)
        and root.lr == pytest.approx(0.04)
        and sde.lr == pytest.approx(4e-3)
        and sde.betas == pytest.approx((1 - 16e-3, 1 - 16e-4), abs=2e-4)
        and sde.eps == pytest.approx(2.5e-9)
    )


def _schedule_is_constant_with_one_entry() -> bool:
    schedule = BatchSizeSchedule((0,), (256,))
    return {schedule.at(samples=n) for n in (0, 1, 10**15)} == {256}


def _published_schedule() -> bool:
    # The example of Megatron-LM's step schedule.
    edges = [0, 249_999_999_999, 250e9, 500e9, 9e12]
    return [MEGATRON.at(tokens=n) for n in edges] == [768, 768, 1536, 3072, 3072]


def _norm_test(eta: float, *, plug_in: bool = False) -> float:
    answer = NormTest(eta, plug_in).propose(SEEN)
    assert answer is not None
    return answer.target_batch


def _noise_rule(factor: float) -> float:
    answer = NoiseScaleRule(factor).propose(SEEN)
    assert answer is not None
    return answer.target_batch


@dataclass(frozen=True)
class Contract:
    """``composes`` is a check, or the reason in words why the function claims no composition."""

    identity: Callable[[], bool]
    published: Callable[[], bool]
    composes: Callable[[], bool] | str


CONTRACTS = {
    "scale_hyperparameters": Contract(
        identity=lambda: all(_scaled(ADAMW, 1, rule) == ADAMW for rule in RULES),
        published=_published_rules,
        composes=_rules_compose,
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
    "noise_scale": Contract(
        identity=lambda: noise_scale([(2.0, 1024.0, 64)] * 3) == (512, 512, 512, 2, 1024, 192),
        # McCandlish et al. 2018, equation 2.9, with the average taken before the ratio.
        published=lambda: noise_scale([(1.0, 10.0, 8), (3.0, 50.0, 8)]).value == 15.0,
        composes="an estimator",
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
        identity=lambda: _noise_rule(1.0) == NOISE.value,
        # McCandlish et al. 2018, section 2.2: train at about the noise scale.
        published=lambda: _noise_rule(0.5) == 256,
        composes="the target does not depend on the present batch",
    ),
    "NormTest": Contract(
        identity=lambda: _norm_test(1.0) == NOISE.value,
        # Lau et al. 2024: S/(η²·|g_B|²), with the expected |g_B|² = 2 + 1024/64 = 18.
        published=lambda: _norm_test(0.5, plug_in=True) == pytest.approx(1024 / (0.25 * 18)),
        composes="the target of the unbiased form does not depend on the present batch",
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
}

RECORDS = {
    "BatchEfficiency": BatchEfficiency(2.0, 2.0),
    "BatchSplit": BatchSplit(32, 4),
    "Hyperparameters": ADAMW,
    "InnerProducts": InnerProducts(32.0, 4.0, 16.0, 64.0),
    "NoiseScale": NOISE,
    "Observation": SEEN,
    "Proposal": Proposal(512.0, 512.0, "noise scale"),
}
PROTOCOLS = {"BatchRule"}
NAMES = {"ESTIMATED_FIELDS", "HYPERPARAMETER_RULES"}

functions = pytest.mark.parametrize(
    "name", [name for name in scaling.__all__ if name not in RECORDS.keys() | PROTOCOLS | NAMES]
)


def test_every_public_name_has_a_contract() -> None:
    assert set(scaling.__all__) == CONTRACTS.keys() | RECORDS.keys() | PROTOCOLS | NAMES


def test_every_listed_rule_can_be_applied() -> None:
    for rule in scaling.HYPERPARAMETER_RULES:
        assert scale_hyperparameters(1.0, rule=rule, lr=0.1, momentum=0.9).lr == 0.1


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


@pytest.mark.parametrize("rule", [NoiseScaleRule(), NormTest(), MEGATRON], ids=repr)
def test_a_rule_meets_the_protocol_and_survives_pickling(rule: BatchRule) -> None:
    assert isinstance(rule, BatchRule)
    assert pickle.loads(pickle.dumps(rule)) == rule
