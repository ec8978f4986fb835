"""The next batch, and the parts of a batch."""

from __future__ import annotations

import math
import random

import pytest

from lightning_ext.scaling import next_global_batch, split_global_batch


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (100.0, 100),
        (119.0, 100),  # below the threshold
        (121.0, 121),
        (150.9, 150),
        (200.0, 200),
        (1e9, 200),  # growth
        (math.inf, 200),
        (math.nan, 100),
        (81.0, 100),
        (10.0, 100),  # monotone
        (-5.0, 100),
    ],
)
def test_one_move_upwards_is_damped_and_limited(target: float, expected: int) -> None:
    assert next_global_batch(100, target, max_global_batch=4096) == expected


@pytest.mark.parametrize(
    ("target", "expected"), [(81.0, 100), (79.5, 79), (50.0, 50), (1.0, 50), (0.0, 50), (-5.0, 50)]
)
def test_one_move_downwards_is_as_limited(target: float, expected: int) -> None:
    got = next_global_batch(100, target, max_global_batch=4096, monotone=False)
    assert got == expected


def test_the_upper_limit_is_never_passed() -> None:
    assert next_global_batch(100, math.inf, max_global_batch=130) == 130
    assert next_global_batch(130, math.inf, max_global_batch=130) == 130


def test_a_batch_of_one_does_not_vanish() -> None:
    assert next_global_batch(1, 0.0, max_global_batch=8, monotone=False) == 1


def test_growth_from_a_batch_of_one_needs_a_factor_of_two() -> None:
    assert next_global_batch(1, 8.0, max_global_batch=8, growth=1.5) == 1
    assert next_global_batch(1, 8.0, max_global_batch=8) == 2


def test_without_damping_the_target_is_met_in_both_directions() -> None:
    for target in (7, 64, 1000):
        got = next_global_batch(
            64, target, max_global_batch=4096, growth=math.inf, threshold=0, monotone=False
        )
        assert got == target


def test_repeated_moves_reach_the_target_and_rest_there() -> None:
    batch, path = 64, []
    for _ in range(8):
        batch = next_global_batch(batch, 1000.0, max_global_batch=4096)
        path.append(batch)
    assert path == [128, 256, 512, 1000, 1000, 1000, 1000, 1000]


def test_a_target_that_wobbles_moves_nothing() -> None:
    rng = random.Random(0)
    targets = [512 * rng.uniform(0.81, 1.19) for _ in range(200)]
    moved = {next_global_batch(512, t, max_global_batch=4096, monotone=False) for t in targets}
    assert moved == {512}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"growth": 1.0}, "growth"),
        ({"growth": math.nan}, "growth"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"max_global_batch": 63}, "below the current batch"),
    ],
)
def test_a_limit_out_of_range_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_global_batch(64, 100.0, **{"max_global_batch": 4096, **change})


def test_a_batch_must_be_an_integer() -> None:
    with pytest.raises(TypeError, match="current must be an int"):
        next_global_batch(64.0, 100.0, max_global_batch=4096)


@pytest.mark.parametrize(
    ("batch", "ranks", "largest", "least", "expected"),
    [
        (512, 4, 128, 1, (128, 1)),
        (512, 4, 127, 1, (64, 2)),
        (512, 4, 32, 1, (32, 4)),
        (512, 4, 128, 2, (64, 2)),
        (10, 1, 3, 1, (2, 5)),  # (2, 4) would lose two samples
        (40, 1, 8, 4, (5, 8)),
        (40, 2, 8, 2, (5, 4)),  # the same micro-batches, on two ranks
        (513, 4, 128, 1, (128, 1)),
        (5, 2, 1, 1, (1, 2)),  # rounding the accumulation up would leave empty micro-batches
        (7, 1, 1, 1, (1, 7)),
    ],
)
def test_a_batch_is_split(batch, ranks, largest, least, expected) -> None:
    got = split_global_batch(
        batch, data_parallel_size=ranks, max_micro_batch=largest, min_accumulate=least
    )
    assert got == expected


def test_every_split_fits_and_loses_less_than_one_sample_per_micro_batch() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        ranks, least, largest = rng.randint(1, 9), rng.randint(1, 4), rng.randint(1, 20)
        batch = rng.randint(ranks * least, 600)
        micro, accumulate = split_global_batch(
            batch, data_parallel_size=ranks, max_micro_batch=largest, min_accumulate=least
        )
        assert 1 <= micro <= largest
        assert accumulate % least == 0
        assert 0 <= batch - micro * accumulate * ranks < accumulate * ranks


def test_fewer_samples_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        split_global_batch(7, data_parallel_size=4, max_micro_batch=8, min_accumulate=2)


@pytest.mark.parametrize("name", ["data_parallel_size", "max_micro_batch", "min_accumulate"])
def test_a_count_must_be_an_integer_of_at_least_1(name: str) -> None:
    counts = {"data_parallel_size": 1, "max_micro_batch": 8, "min_accumulate": 1}
    with pytest.raises(ValueError, match=name):
        split_global_batch(8, **{**counts, name: 0})
    with pytest.raises(TypeError, match=name):
        split_global_batch(8, **{**counts, name: 2.0})
