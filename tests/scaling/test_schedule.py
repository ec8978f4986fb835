"""Batch-size schedules: reading, looking up, writing, refusing."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from lightning_ext.scaling import BatchSizeSchedule, Observation

parse = BatchSizeSchedule.parse


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("0:1 5:2", (0, 5)),
        ("0:1 2k:2 3M:4", (0, 2000, 3_000_000)),
        ("0:1 1.5B:2 0.25T:4", (0, 1_500_000_000, 250_000_000_000)),
        ("0:1 0.1M:2", (0, 100_000)),
        ("  0:1\n 7:2\t", (0, 7)),
    ],
)
def test_bare_starts_are_samples_with_decimal_suffixes(text: str, starts) -> None:
    schedule = parse(text)
    assert schedule.starts == starts
    assert schedule.unit == "samples"
    assert all(isinstance(start, int) for start in schedule.starts)


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("0:1 5:2", "samples", "samples"),
        ("0:1 5:2", "tok", "tokens"),
        ("0:1 5tok:2", "samples", "tokens"),
        ("0tok:1 5ktok:2", "samples", "tokens"),
        ("0:1 5%:2", "samples", "percent"),
        ("0%:1 5%:2", "tok", "percent"),
        ("0:1", "samples", "samples"),
        ("0:1", "tok", "tokens"),
        ("0%:1", "samples", "percent"),
    ],
)
def test_all_entries_count_the_unit_that_one_of_them_names(text, unit, expected) -> None:
    assert parse(text, unit=unit).unit == expected


def test_a_batch_may_have_a_suffix() -> None:
    assert parse("0:1k 5:1.5k").global_batches == (1000, 1500)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "no entries"),
        ("256", "cannot be read"),
        ("0:256,5:512", "cannot be read"),
        ("0 :256", "cannot be read"),
        ("0:-256", "cannot be read"),
        ("-1:256", "cannot be read"),
        ("0:256 1K:512", "cannot be read"),
        ("0:256 1e6:512", "cannot be read"),
        ("0:256 tok:512", "cannot be read"),
        ("0:256 1tokk:512", "cannot be read"),
        ("0:256 ١:512", "cannot be read"),
        ("0:256 1k%:512", "before '%'"),
        ("0:256 1.5:512", "fraction"),
        ("0:256 0.0001ktok:512", "fraction"),
        ("0:0", "at least 1"),
        ("0:2.5", "whole number"),
        ("1:256", "must be 0"),
        ("0:256 0:512", "strictly increase"),
        ("0:256 2k:512 2000:1024", "strictly increase"),
        ("0:256 2M:512 1M:1024", "strictly increase"),
        ("0:256 100%:512", "below 100"),
        ("0:256 1M:512 2Mtok:1024", "mixes samples and tokens"),
        ("0:256 10%:512 2Mtok:1024", "mixes percent and tokens"),
        ("0tok:256 1M:512", "mixes samples and tokens"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse(text)


def test_a_bare_start_is_tokens_next_to_marked_tokens_if_the_unit_says_so() -> None:
    assert parse("0:1 1M:2 2Mtok:4", unit="tok").starts == (0, 10**6, 2 * 10**6)


def test_units_and_types_are_checked() -> None:
    with pytest.raises(ValueError, match="'samples' or 'tok'"):
        parse("0:1", unit="epochs")
    with pytest.raises(TypeError, match="must be a string"):
        parse(256)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (((), ()), ValueError),
        (((0, 1), (64,)), ValueError),
        (((0,), (64,), "epochs"), ValueError),
        (((0,), (64.0,)), TypeError),
        (((0,), (True,)), TypeError),
        (((0,), (0,)), ValueError),
        (((0, float("nan")), (64, 128)), ValueError),
        (((0, "1"), (64, 128)), TypeError),
    ],
)
def test_fields_are_checked_as_the_text_is(fields, error: type[Exception]) -> None:
    with pytest.raises(error):
        BatchSizeSchedule(*fields)


def test_an_entry_holds_from_its_start_on() -> None:
    schedule = parse("0:64 1k:128 2k:96")
    assert [schedule.at(samples=n) for n in (0, 999, 1000, 1999, 2000, 10**12)] == [
        64,
        64,
        128,
        128,
        96,
        96,
    ]


def test_percents_are_of_the_whole_run() -> None:
    schedule = parse("0:64 12.5%:128 33.3%:256")
    batches = [schedule.at(samples=n, total_samples=1000) for n in (0, 124, 125, 332, 333, 2000)]
    assert batches == [64, 64, 128, 128, 256, 256]


def test_the_largest_batch_need_not_be_the_last() -> None:
    assert parse("0:64 1k:128 2k:96").max_global_batch == 128


@pytest.mark.parametrize(
    ("text", "given", "missing"),
    [
        ("0:64", {"tokens": 5}, "samples"),
        ("0:64 1tok:128", {"samples": 5}, "tokens"),
        ("0:64 1%:128", {"samples": 5}, "total_samples"),
        ("0:64 1%:128", {"total_samples": 5}, "samples"),
        ("0:64 1%:128", {"samples": 0, "total_samples": 0}, "total_samples=0"),
        ("0:64", {"samples": -1}, "samples=-1"),
    ],
)
def test_what_the_unit_needs_must_be_given(text, given, missing) -> None:
    with pytest.raises(ValueError, match=missing):
        parse(text).at(**given)


def test_a_random_schedule_reads_back_what_it_writes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        unit = rng.choice(["samples", "tokens", "percent"])
        if unit == "percent":
            later = {round(rng.uniform(1e-6, 99.9), rng.randint(0, 9)) for _ in range(4)}
        else:
            later = {rng.randint(1, 999) * 10 ** rng.randint(0, 13) for _ in range(4)}
        starts = tuple(sorted({0, *later}))
        batches = tuple(rng.randint(1, 10**6) for _ in starts)
        schedule = BatchSizeSchedule(starts, batches, unit)
        assert parse(str(schedule)) == schedule


def test_the_text_is_short() -> None:
    assert str(parse("0:64 2000000:128 2500000:256")) == "0:64 2M:128 2500k:256"


def test_as_a_rule_it_answers_at_the_observed_position() -> None:
    answer = parse("0:64 1M:128").propose(Observation(64, 1_500_000))
    assert (answer.target_batch, answer.statistic) == (128.0, 1_500_000)
    assert answer.reason == "schedule 1M:128"


def test_as_a_rule_it_names_the_quantity_that_is_not_observed() -> None:
    with pytest.raises(ValueError, match="needs tokens"):
        parse("0:64 1tok:128").propose(Observation(64, 10))


def test_it_needs_no_measurement() -> None:
    assert parse("0:64").needs == frozenset()


def _megatron(start: int, increment: int, samples: int, end: int, consumed: int) -> int:
    """The published arithmetic, in exact numbers: past the ramp the end, before it whole steps."""
    each = Fraction(samples, (end - start) // increment)
    return end if consumed > samples else start + int(consumed / each) * increment


@pytest.mark.parametrize(
    "ramp", [(32, 32, 1000, 192), (16, 8, 300, 40), (256, 128, 50_000_000, 1024), (1, 1, 7, 8)]
)
def test_a_ramp_has_the_batches_of_megatron_at_every_sample(ramp) -> None:
    start, increment, samples, end = ramp
    schedule = BatchSizeSchedule.ramp(start, increment, samples, end=end)
    edges = {n for s in schedule.starts for n in (s - 1, s, s + 1)} | {2 * samples, samples // 3}
    for consumed in sorted(edges - {-1}):
        assert schedule.at(samples=consumed) == _megatron(*ramp, consumed)
    assert parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("ramp", "error"),
    [
        ((32, 32, 1000, 200), "no ramp"),
        ((32, 32, 1000, 32), "no ramp"),
        ((64, 32, 1000, 32), "no ramp"),
        ((1, 1, 3, 8), "no ramp"),
        ((0, 32, 1000, 64), "start=0"),
        ((32, 0, 1000, 64), "increment=0"),
        ((32, 32, 0, 64), "samples=0"),
    ],
)
def test_what_is_no_ramp_is_refused(ramp, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        BatchSizeSchedule.ramp(*ramp)
