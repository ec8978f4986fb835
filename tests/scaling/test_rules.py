"""What holds for every rule, whatever it reads."""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace

import pytest

from lightning_ext.scaling import (
    ESTIMATED_FIELDS,
    HYPERPARAMETER_RULES,
    AdaDamp,
    AugmentedTest,
    BatchRule,
    CoordinateTest,
    CriticalBatchLaw,
    DiversityRule,
    GeoDamp,
    GoodputRule,
    GSNRRule,
    InnerProducts,
    InnerProductTest,
    NoiseScale,
    NoiseScaleRule,
    NormTest,
    Observation,
    OptimalBatchRule,
    PadaDamp,
    RadaDamp,
    Seesaw,
    SimilarityRule,
)

RULES = [
    NoiseScaleRule(),
    NoiseScaleRule(threshold=2.0),
    OptimalBatchRule(128.0),
    NormTest(),
    NormTest(plug_in=True),
    InnerProductTest(),
    AugmentedTest(),
    CoordinateTest(),
    SimilarityRule(),
    SimilarityRule(step=0.1),
    DiversityRule(),
    GSNRRule(),
    CriticalBatchLaw(1024.0),
    AdaDamp(),
    RadaDamp(),
    PadaDamp(0.5),
    GeoDamp(2.0, 1000),
    Seesaw(),
    GoodputRule(),
]
POSITIONAL = [rule for rule in RULES if not rule.needs]
MEASURING = [rule for rule in RULES if rule.needs]
DAMPING = (AdaDamp, RadaDamp, PadaDamp, GeoDamp)


def step_seconds(batch: int) -> float:
    return 0.1 + 0.001 * batch


SEEN = Observation(
    global_batch=64,
    samples_seen=6400,
    noise=NoiseScale(512.0, 400.0, 700.0, 0.5, 256.0, 6400),
    reference_batch=64,
    inner_products=InnerProducts(4.0, 0.5, 0.25, 64.0),
    coordinates={0.5: 32.0, 0.9: 512.0, 0.99: 4096.0, 1.0: 1e9},
    loss=1.0,
    first_loss=2.0,
    first_grad_sq_norm=1.0,
    lr_decay=0.25,
    step_seconds=step_seconds,
    max_global_batch=4096,
)
rules = pytest.mark.parametrize("rule", RULES, ids=repr)
measuring = pytest.mark.parametrize("rule", MEASURING, ids=repr)


@rules
def test_a_rule_meets_the_protocol(rule) -> None:
    assert isinstance(rule, BatchRule)
    assert rule.needs <= {field.name for field in fields(Observation)}


@rules
def test_a_rule_is_a_value(rule) -> None:
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert hash(again) == hash(rule)
    assert eval(repr(rule)) == rule


@rules
def test_a_rule_answers_with_a_batch_and_one_line(rule) -> None:
    answer = rule.propose(SEEN)
    assert answer is not None
    assert answer.target_batch > 0
    assert isinstance(answer.target_batch, float)
    assert isinstance(answer.statistic, float)
    assert " against " in answer.reason
    assert "\n" not in answer.reason


@measuring
def test_a_rule_has_no_opinion_while_any_one_of_its_needs_is_missing(rule) -> None:
    for name in rule.needs:
        assert rule.propose(replace(SEEN, **{name: None})) is None


@rules
def test_a_rule_reads_nothing_that_it_does_not_need(rule) -> None:
    others = {*ESTIMATED_FIELDS, "lr_decay"} - rule.needs
    assert rule.propose(replace(SEEN, **dict.fromkeys(others))) == rule.propose(SEEN)


def _spoiled(name: str, bad: float) -> object:
    value = getattr(SEEN, name)
    if isinstance(value, tuple):
        return type(value)(*(bad for _ in value[:-1]), value[-1])
    if isinstance(value, dict):
        return dict.fromkeys(value, bad)
    return (lambda batch: bad) if callable(value) else bad


@measuring
@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_a_rule_has_no_opinion_on_measurements_that_mean_nothing(rule, bad: float) -> None:
    for name in rule.needs:
        assert rule.propose(replace(SEEN, **{name: _spoiled(name, bad)})) is None


@measuring
@pytest.mark.parametrize("bad", [math.inf, 1e308, 1e-308, 5e-324])
def test_extreme_measurements_raise_nothing(rule, bad: float) -> None:
    for name in rule.needs:
        answer = rule.propose(replace(SEEN, **{name: _spoiled(name, bad)}))
        assert answer is None or answer.target_batch > 0


@pytest.mark.parametrize(
    "rule", [r for r in RULES if isinstance(r, (*DAMPING, Seesaw, GoodputRule))]
)
def test_a_rule_around_the_reference_batch_wants_to_know_it(rule) -> None:
    assert rule.propose(replace(SEEN, reference_batch=None)) is None


@rules
def test_the_dampers_alone_damp_the_learning_rate(rule) -> None:
    assert getattr(rule, "damps_lr", False) == isinstance(rule, DAMPING)
    assert (getattr(rule, "lr_rule", None) == "constant") == isinstance(rule, DAMPING)
    assert getattr(rule, "lr_rule", "none") in HYPERPARAMETER_RULES
