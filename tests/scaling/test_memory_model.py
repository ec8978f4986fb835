"""The memory model: what a fit recovers, what it refuses, and the largest batch that fits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ext.scaling import MemoryModel

PLANTED = MemoryModel(2e9, 3e6, 4e4, 20.0)
SIZES = [(n, length) for n in (1, 2, 4, 8, 16) for length in (128, 512, 2048)]

drawn = settings(derandomize=True, deadline=None, database=None)
coefficients = st.floats(0, 1e12, allow_subnormal=False)
models = st.builds(
    MemoryModel,
    fixed_bytes=coefficients,
    sample_bytes=st.floats(1e3, 1e9),
    token_bytes=st.floats(0, 1e6),
    token_pair_bytes=st.floats(0, 1e3),
)


def rows(model: MemoryModel, noise: float = 0.0, repeats: int = 1) -> list[Any]:
    draw = random.Random(0)
    return [
        (n, length, model.bytes(n, length) * (1 + draw.gauss(0, noise)))
        for n, length in SIZES
        for _ in range(repeats)
    ]


def test_a_fit_recovers_what_was_planted() -> None:
    found = MemoryModel.fit(rows(PLANTED))
    assert vars(found) == pytest.approx(vars(PLANTED), rel=1e-6)


def test_a_fit_recovers_what_was_planted_under_noise() -> None:
    found = MemoryModel.fit(rows(PLANTED, noise=0.01, repeats=40))
    assert found.fixed_bytes == pytest.approx(PLANTED.fixed_bytes, rel=0.01)
    assert found.token_bytes == pytest.approx(PLANTED.token_bytes, rel=0.05)
    assert found.token_pair_bytes == pytest.approx(PLANTED.token_pair_bytes, rel=0.02)
    for n, length in [(1, 64), (64, 512), (32, 4096)]:
        assert found.bytes(n, length) == pytest.approx(PLANTED.bytes(n, length), rel=0.01)


def test_errors_count_relative_to_what_was_measured() -> None:
    # A tenth too much at 1 TB must not move what is said of 1 GB.
    true = MemoryModel(1e9, 1e8)
    exact = [(n, None, true.bytes(n)) for n in (1, 2, 3, 4, 5, 6)]
    found = MemoryModel.fit([*exact, (10_000, None, 1.1 * true.bytes(10_000))])
    assert found.bytes(1) == pytest.approx(true.bytes(1), rel=0.02)


@drawn
@given(
    models,
    st.lists(st.floats(0.5, 1.5), min_size=len(SIZES), max_size=len(SIZES)),
)
def test_a_prediction_never_falls(model: MemoryModel, factors: list[float]) -> None:
    noisy = [
        (n, length, model.bytes(n, length) * factor)
        for (n, length), factor in zip(SIZES, factors, strict=True)
    ]
    found = MemoryModel.fit(noisy)
    assert min(vars(found).values()) >= 0
    assert found.bytes(1, 128) <= found.bytes(2, 128) <= found.bytes(2, 129)


@drawn
@given(models, st.floats(1.0001, 1e3), st.integers(1, 4096), st.floats(0, 0.9))
def test_the_largest_is_the_largest_that_fits(
    model: MemoryModel, factor: float, length: int, margin: float
) -> None:
    budget = model.bytes(1, length) * factor / (1 - margin)
    found = model.largest(budget, length, margin=margin)
    limit = budget * (1 - margin)
    assert model.bytes(found, length) <= limit < model.bytes(found + 1, length)


def test_a_budget_that_is_just_enough_is_enough() -> None:
    model = MemoryModel(0.1, 0.3)
    assert all(model.largest(model.bytes(n), margin=0.0) == n for n in range(1, 1000))


def test_a_tenth_of_the_budget_stays_free() -> None:
    model = MemoryModel(100, 10)
    assert model.largest(1000) == 80
    assert model.largest(1000, margin=0.0) == 90


def test_rows_without_lengths_make_a_line() -> None:
    assert MemoryModel.fit([(1, None, 130), (2, None, 160), (4, None, 220)]).bytes(8) == (
        pytest.approx(340)
    )


def test_without_pairs_two_lengths_are_enough() -> None:
    true = MemoryModel(50.0, 0.0, 3.0)
    found = MemoryModel.fit(
        [(n, length, true.bytes(n, length)) for n in (1, 2) for length in (10, 20)],
        quadratic=False,
    )
    assert found.bytes(9, 1000) == pytest.approx(true.bytes(9, 1000))


@pytest.mark.parametrize(
    ("sizes", "term"),
    [
        ([(4, None), (4, None)], "fixed_bytes"),
        ([(4, 10), (4, 20), (4, 30)], "fixed_bytes"),
        ([(1, 10), (2, 10), (4, 10)], "token_bytes"),
        ([(1, 10), (2, 10), (1, 20), (2, 20)], "token_pair_bytes"),
        ([(1, 10), (2, 20)], "token_bytes"),
    ],
)
def test_a_term_that_cannot_be_told_is_named(sizes: list[Any], term: str) -> None:
    with pytest.raises(ValueError, match=f"cannot tell {term} from the other terms; measure at"):
        MemoryModel.fit([(n, length, 100.0 + n * (length or 1)) for n, length in sizes])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples is empty"),
        ([(1, 10, 5.0), (2, None, 6.0)], "1 of 2 samples have no length"),
        ([(0, None, 5.0)], r"micro_batch of samples\[0\]=0"),
        ([(1, None, 5.0), (2, None, 0.0)], r"bytes of samples\[1\]=0.0"),
        ([(1, 0, 5.0)], r"length of samples\[0\]=0"),
    ],
)
def test_rows_out_of_range_are_refused(samples: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryModel.fit(samples)


@pytest.mark.parametrize(
    ("model", "length", "message"),
    [
        (PLANTED, None, "a model that needs a length; fit it to rows without"),
        (MemoryModel(1, 1), 8, "a model that has no term for a length; fit it to rows with"),
    ],
)
def test_a_length_is_given_where_there_is_a_term(
    model: MemoryModel, length: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.bytes(1, length)
    with pytest.raises(ValueError, match=message):
        model.largest(1e12, length)


@pytest.mark.parametrize(
    ("model", "budget", "message"),
    [
        (MemoryModel(100, 10), 100, "leaves 90 after .*; the fixed part takes 100 and one sample"),
        (MemoryModel(100, 10), 121, "leaves 108.9 after"),
        (MemoryModel(100, 0), 1000, "a sample costs 0 bytes"),
        (MemoryModel(100, 10), 0, "budget_bytes=0"),
    ],
)
def test_a_budget_without_a_largest_batch_is_refused(
    model: MemoryModel, budget: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.largest(budget)


@pytest.mark.parametrize("margin", [-0.1, 1.0])
def test_a_margin_is_a_part_of_the_budget(margin: float) -> None:
    with pytest.raises(ValueError, match="margin="):
        MemoryModel(1, 1).largest(100, margin=margin)


@pytest.mark.parametrize(
    "wrong",
    [{"fixed_bytes": -1}, {"sample_bytes": -1}, {"token_bytes": -1}, {"token_pair_bytes": 1.0}],
)
def test_coefficients_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MemoryModel(**({"fixed_bytes": 1, "sample_bytes": 1} | wrong))


def test_adam_in_mixed_precision_takes_sixteen_bytes_per_parameter() -> None:
    # Rajbhandari et al. 2020, section 3.1: 24 GB for the 1.5 billion parameters of GPT-2.
    model = MemoryModel.analytic(
        1_500_000_000, weight_bytes=2, gradient_bytes=2, optimizer_bytes=12, sample_bytes=1e9
    )
    assert model.fixed_bytes == 24e9


def test_the_defaults_are_adam_in_float32() -> None:
    assert MemoryModel.analytic(10, sample_bytes=1, token_bytes=2).bytes(3, 4) == 160 + 3 * 9


def test_bytes_per_parameter_are_checked() -> None:
    with pytest.raises(ValueError, match="optimizer_bytes=-8"):
        MemoryModel.analytic(10, sample_bytes=1, optimizer_bytes=-8)
    with pytest.raises(ValueError, match="parameters=0"):
        MemoryModel.analytic(0, sample_bytes=1)
