"""The contract of the room, run over everything that it lists."""

from __future__ import annotations

import inspect

import pytest
import torch
from harness.deepspeed_parts import KNOWN_WARNINGS, warm_up
from harness.strategy_cases import CASES, PRECISIONS, alone, distance, flat, on_ranks
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_ext import strategies

pytestmark = KNOWN_WARNINGS
# What two ranks do not show: parts within nodes, and replicas of stages. The other fours are slow.
OF_FOUR = ("ZeroPPStrategy", "PipelineStrategy, fsdp2", "PipelineStrategy, ddp")
every_case_and_world = pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(name, world, marks=[pytest.mark.slow] * (world > 2 and name not in OF_FOUR))
        for name in CASES
        for world in (2, 4)
    ],
)


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    warm_up()


def test_every_strategy_is_in_the_table() -> None:
    # What else the room lists, collectives and functions, is what strategies are made of.
    found = {name: getattr(strategies, name) for name in strategies.__all__}
    classes = {n for n, x in found.items() if inspect.isclass(x) and issubclass(x, Strategy)}
    assert classes == {name.partition(",")[0] for name in CASES} - {"ddp"}


@every_case_and_world
def test_weights_after_50_steps_are_those_of_one_process(name: str, world: int) -> None:
    case = CASES[name]
    for found in on_ranks(name, world):
        assert distance(found.norm, alone(name).norm) <= case.parameters


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by_value])
def test_weights_after_clipping_by_value_are_those_of_one_process(name: str) -> None:
    case = CASES[name]
    for found in on_ranks(name, 2):
        assert distance(found.value, alone(name).value) <= case.parameters


def size(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


@every_case_and_world
def test_first_gradients_are_those_of_one_process(name: str, world: int) -> None:
    truth, bound = alone(name).gradients, CASES[name].gradients
    for ranks in on_ranks(name, world):
        found = {parameter: ranks.gradients[parameter] for parameter in truth}
        assert not any(ranks.gradients[one].any() for one in ranks.gradients.keys() - truth)
        assert size(flat(found) - flat(truth)) <= bound * size(flat(truth))
        if CASES[name].is_exact:
            assert all(size(found[one] - x) <= bound * size(x) for one, x in truth.items())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_bf16_stays_within_the_stated_part_of_the_way(name: str, precision: str) -> None:
    truth = flat(alone(name).bf16[precision])
    way = truth - flat(dict(CASES[name].module().named_parameters()))
    for found in on_ranks(name, 2):
        assert size(flat(found.bf16[precision]) - truth) <= CASES[name].bf16 * size(way)


@pytest.mark.parametrize("name", CASES)
def test_through_a_checkpoint_is_bitwise_the_run_without_it(name: str) -> None:
    for found in on_ranks(name, 2):
        assert distance(found.resumed, found.straight) == 0


@pytest.mark.parametrize("name", CASES)
def test_an_export_loads_in_one_process(name: str) -> None:
    for found in on_ranks(name, 2):
        assert distance(found.exported, found.straight) == 0
