"""Moments of few bits where ranks share parameters, by fully_shard."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from harness import run_distributed
from harness.low_bit_sharded import (
    EMPTY_ON_THE_LAST_OF_FOUR,
    FORMATS,
    OPTIMIZERS,
    Run,
    Weights,
    distance,
    own_rows,
    same,
)
from torch import nn

from lightning_ext.optim import LowBitAdamW

STEPS = 20
WHOLE_BLOCKS = ("aligned", "one_row")  # of the shapes: what ranks have of them
IN_FLOAT32 = ("small", "vector")
ENTRY_BY_ENTRY = ("LowBitAdamW", "Lion")  # no sum is added up in another order
BOUNDS = {"float32": 1e-6, "bfloat16": 0.03, "int8": 0.05, "fp8": 0.06, "int4": 0.25}
# Formats of a class in short; its others are slow.
SHORT = {
    "LowBitAdamW": FORMATS,
    "Lion": ("int8",),
    "LAMB": ("int8", "int4"),
    "AdamP": ("int8", "int4"),
    "NorMuon": ("int8", "int4"),
}
every_class = pytest.mark.parametrize("name", OPTIMIZERS)
every_class_and_format = pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(name, x, marks=[pytest.mark.slow] * (x not in SHORT[name]))
        for name in OPTIMIZERS
        for x in FORMATS
    ],
)


class Ends(NamedTuple):
    """What a rank came to: whole weights, its bytes of states, and its moments' numbers."""

    weights: Weights
    start: Weights
    bytes: int
    numbers: Weights
    plain: bool


def ends(run: Run) -> Ends:
    run.run(STEPS)
    return Ends(run.weights(), run.start, run.bytes(), run.numbers(), run.plain())


def of_formats(name: str, formats: tuple[str, ...]) -> dict[str, Ends]:
    return {format: ends(Run(name, state_dtype=format)) for format in formats}


@functools.cache
def together(name: str, formats: tuple[str, ...]) -> list[dict[str, Ends]]:
    return run_distributed(of_formats, args=(name, formats))


def on_two_ranks(name: str, format: str) -> list[Ends]:
    """What ranks came to, along with the other formats of the same haste."""
    formats = tuple(x for x in FORMATS if (x in SHORT[name]) == (format in SHORT[name]))
    return [found[format] for found in together(name, formats)]


@functools.cache
def alone(name: str, format: str) -> Ends:
    return ends(Run(name, sharded=False, state_dtype=format))


def apart(found: Ends, truth: Ends, names: tuple[str, ...]) -> float:
    kept = ({n: x[n] for n in names} for x in (found.weights, truth.weights, truth.start))
    return distance(*kept)


@every_class_and_format
def test_ranks_with_whole_blocks_are_one_process(name: str, format: str) -> None:
    truth, names = alone(name, format), IN_FLOAT32
    if format != "bfloat16":  # whose random bits go by the place on the rank
        names += WHOLE_BLOCKS
    for found in on_two_ranks(name, format):
        error = apart(found, truth, names)
        assert error == 0 if name in ENTRY_BY_ENTRY else error <= 1e-6


@every_class_and_format
def test_ranks_that_cut_blocks_are_near_one_process(name: str, format: str) -> None:
    truth = alone(name, format)
    names = tuple(set(truth.weights) - {"unused"})
    for found in on_two_ranks(name, format):
        assert apart(found, truth, names) <= BOUNDS[format]


@every_class_and_format
def test_all_ranks_have_the_same_weights(name: str, format: str) -> None:
    one, other = on_two_ranks(name, format)
    assert same(one.weights, other.weights)


@every_class_and_format
def test_ranks_share_the_memory_of_states(name: str, format: str) -> None:
    parts = [found.bytes for found in on_two_ranks(name, format)]
    total = alone(name, format).bytes
    # Maxima of columns are on every rank, and each begins a block of its own.
    assert total <= sum(parts) <= total * (1.03 if format == "int4" else 1.001)
    assert max(parts) < 0.57 * total if format != "int4" else max(parts) < 0.69 * total


@every_class_and_format
def test_saved_states_are_tensors(name: str, format: str) -> None:
    assert all(found.plain for found in on_two_ranks(name, format))


@pytest.mark.parametrize("name", ["LowBitAdamW", "LAMB", "AdamP"])
def test_second_moments_in_int4_are_those_of_one_process(name: str) -> None:
    # They do not depend on weights, which the first moments move apart.
    truth = alone(name, "int4").numbers
    for rank, found in enumerate(on_two_ranks(name, "int4")):
        for key in (f"{x}.exp_avg_sq" for x in ("aligned", "cut", "conv", "rare")):
            assert torch.equal(found.numbers[key], own_rows(truth[key], rank, 2)), key


ON_FOUR = ("int4", "int8", "fp8")


class FewRows(NamedTuple):
    """What one of four ranks came to, the last of which has no row.

    Args:
        ends: by format.
        entries: of each of its parameters.
        of_nothing: weights by class and format, of one parameter.
    """

    ends: dict[str, Ends]
    entries: list[int]
    of_nothing: dict[tuple[str, str], Weights]


def few_rows(format: str, *, sharded: bool) -> Run:
    shapes = EMPTY_ON_THE_LAST_OF_FOUR
    return Run("LowBitAdamW", sharded=sharded, shapes=shapes, state_dtype=format)


def with_few_rows() -> FewRows:
    runs = {format: few_rows(format, sharded=True) for format in ON_FOUR}
    entries = [p.to_local().numel() for p in runs["int4"].module.parameters()]
    nothing = {
        (name, x): Run(name, shapes={"few_rows": (5, 1000)}, state_dtype=x).run(3).weights()
        for name in OPTIMIZERS
        for x in ("int8", "int4")
    }
    return FewRows({x: ends(run) for x, run in runs.items()}, entries, nothing)


@functools.cache
def on_four_ranks() -> list[FewRows]:
    return run_distributed(with_few_rows, 4)


@pytest.mark.parametrize("format", ON_FOUR)
def test_ranks_without_rows_take_part(format: str) -> None:
    truth = ends(few_rows(format, sharded=False))
    found = on_four_ranks()
    assert found[3].entries[0] == 0
    for rank, one in enumerate(x.ends[format] for x in found):
        assert apart(one, truth, tuple(truth.weights)) <= BOUNDS[format]
        if format == "int4":
            for key in ("few_rows.exp_avg_sq", "matrix.exp_avg_sq"):
                assert torch.equal(one.numbers[key], own_rows(truth.numbers[key], rank, 4))


@every_class
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_rank_that_has_nothing_at_all_takes_part(name: str, format: str) -> None:
    found = [x.of_nothing[name, format] for x in on_four_ranks()]
    assert all(same(x, found[0]) for x in found)
    assert all(x["few_rows"].isfinite().all() for x in found)


def mixed(module: nn.Module, ranks: int) -> LowBitAdamW:
    named = dict(module.named_parameters())
    formats = {"aligned": "int8", "cut": "int4", "conv": "fp8", "rare": "int4", "vector": "int4"}
    groups = [{"params": [named.pop(n)], "state_dtype": f} for n, f in formats.items()]
    return LowBitAdamW([*groups, {"params": list(named.values())}], lr=0.01, state_dtype="float32")


def in_mixed_formats(ranks: int) -> Ends:
    run = Run("LowBitAdamW", sharded=ranks > 1)
    run.optimizer = mixed(run.module, ranks)
    return ends(run)


def test_groups_may_have_formats_of_their_own() -> None:
    truth = in_mixed_formats(1)
    for rank, found in enumerate(run_distributed(in_mixed_formats, args=(2,))):
        assert apart(found, truth, ("aligned", "one_row", "vector")) == 0
        for key in ("cut.exp_avg_sq", "rare.exp_avg_sq"):
            assert torch.equal(found.numbers[key], own_rows(truth.numbers[key], rank, 2))


def replicated(format: str, mesh: tuple[int, ...]) -> Weights:
    return Run("LowBitAdamW", mesh=mesh, state_dtype=format).run(STEPS).weights()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_replicas_of_shards_are_those_shards(format: str) -> None:
    truth = on_two_ranks("LowBitAdamW", format)[0].weights
    for found in run_distributed(replicated, 4, args=(format, (2, 2))):
        assert same(found, truth)


def compensated(sharded: bool) -> tuple[Weights, Weights]:
    how = {"state_dtype": "float32", "weight_rounding": "compensated"}
    run = Run("LowBitAdamW", sharded=sharded, dtype=torch.bfloat16, **how).run(STEPS)
    errors = {n: x for n, x in run.numbers().items() if n.endswith("weight_error")}
    return run.weights(), errors


def test_errors_of_weights_are_those_of_one_process() -> None:
    weights, errors = compensated(False)
    assert len(errors) > 5
    for rank, (found, own) in enumerate(run_distributed(compensated, args=(True,))):
        assert same(found, weights)
        assert same(own, {n: own_rows(x, rank, 2) for n, x in errors.items()})


def stochastic(sharded: bool) -> Ends:
    how = {"state_dtype": "int8", "weight_rounding": "stochastic"}
    return ends(Run("LowBitAdamW", sharded=sharded, dtype=torch.bfloat16, **how))


def test_weights_rounded_at_random_are_near_those_of_one_process() -> None:
    truth = stochastic(False)
    one, other = run_distributed(stochastic, args=(True,))
    assert same(one.weights, other.weights)
    assert apart(one, truth, tuple(set(truth.weights) - {"unused"})) <= 0.1
