"""Moving averages: exact ends, dtypes, several decays, what is refused and what is remembered."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from harness import assert_accurate
from torch import Tensor, nn

from lightning_ext.functional import ema_update_

SHAPES = [(3, 4), (5,), (), (0,)]


def _pairs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    averages = [torch.randn(shape) for shape in SHAPES]
    return averages, [torch.randn(shape).to(dtype) for shape in SHAPES]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("decay", [0.1, 0.5, 0.999])
def test_it_is_bitwise_what_one_foreach_call_makes(dtype: torch.dtype, decay: float) -> None:
    averages = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    values = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    expected = [x.clone() for x in averages]
    torch._foreach_lerp_(expected, values, 1 - decay)
    ema_update_(averages, values, decay)
    assert _equal(averages, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_as_if_it_were_widened_first(dtype: torch.dtype) -> None:
    averages, values = _pairs(dtype)
    expected = [x.clone() for x in averages]
    torch._foreach_lerp_(expected, [x.float() for x in values], 1 - 0.9)
    ema_update_(averages, values, 0.9)
    assert _equal(averages, expected)


def test_an_average_may_be_wider_than_float32() -> None:
    average = torch.ones(3, dtype=torch.float64)
    ema_update_([average], [torch.zeros(3, dtype=torch.bfloat16)], 1 - 1e-9)
    assert average.tolist() == [1 - 1e-9] * 3


@pytest.mark.parametrize("decay", [1.0, torch.tensor(1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_a_decay_of_one_leaves_every_bit(decay: float | Tensor, value: float) -> None:
    average = torch.tensor([-0.0, math.inf, 1.1])
    before = average.view(torch.int32).clone()
    ema_update_([average], [torch.full((3,), value)], decay)
    assert torch.equal(average.view(torch.int32), before)


@pytest.mark.parametrize("decay", [0.0, torch.tensor(0.0)])
def test_a_decay_of_zero_copies(decay: float | Tensor) -> None:
    average = torch.tensor([math.nan, math.inf, 1.1])
    ema_update_([average], [torch.tensor([2.0, -0.0, 3.3])], decay)
    assert torch.equal(average, torch.tensor([2.0, -0.0, 3.3]))


def test_several_decays_are_several_averages_of_the_same_values() -> None:
    averages, values = _pairs(torch.bfloat16)
    decays = [0.9, torch.tensor(0.5), 0.0, 1.0]
    together = [[x.clone() for x in averages] for _ in decays]
    ema_update_(together, values, decays)
    for each, decay in zip(together, decays, strict=True):
        alone = [x.clone() for x in averages]
        ema_update_(alone, values, decay)
        assert _equal(each, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_in_a_tensor_is_the_same_number(dtype: torch.dtype) -> None:
    averages, values = _pairs()
    expected = [x.clone() for x in averages]
    decay = torch.tensor(0.75, dtype=dtype)
    ema_update_(averages, values, decay)
    ema_update_(expected, values, 0.75)
    assert _equal(averages, expected)


def test_a_tensor_that_is_differentiated_is_as_exact() -> None:
    averages, values = _pairs()
    expected = [x.double() for x in averages]
    ema_update_(expected, [x.double() for x in values], 0.75)
    ema_update_(averages, values, torch.tensor(0.75, requires_grad=True))
    for found, truth in zip(averages, expected, strict=True):
        assert_accurate(found.detach(), truth)


def test_many_small_steps_are_not_lost() -> None:
    average = torch.ones(1)
    for _ in range(1000):
        ema_update_([average], [torch.zeros(1, dtype=torch.bfloat16)], 0.999)
    assert average.item() == pytest.approx(0.999**1000, rel=1e-5)


def test_nothing_to_average_is_allowed() -> None:
    ema_update_([], [], 0.5)
    ema_update_([[], []], [], [0.5, 0.1])


def test_parameters_are_read_and_not_changed() -> None:
    module = nn.Linear(3, 2)
    before = [x.detach().clone() for x in module.parameters()]
    averages = [torch.zeros_like(x) for x in before]
    with torch.no_grad():
        ema_update_(averages, list(module.parameters()), 0.0)
    assert _equal(averages, before)
    assert _equal([x.detach() for x in module.parameters()], before)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, torch.tensor(2.0)])
def test_a_decay_out_of_range_is_refused(decay: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ema_update_([torch.ones(1)], [torch.ones(1)], decay)


def test_a_decay_for_every_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="one number or a list"):
        ema_update_([torch.ones(2)], [torch.ones(2)], torch.ones(2))


@pytest.mark.parametrize(
    ("averages", "values", "match"),
    [
        ([torch.ones(2)], [], "1 averages and 0 values"),
        ([torch.ones(2)], [torch.ones(1)], "average 0 has shape"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], "on meta"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    averages: list[Tensor], values: list[Tensor], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ema_update_(averages, values, 0.9)


@pytest.mark.parametrize("averages", [[torch.ones(1)], [[torch.ones(1)]], []])
def test_several_decays_need_as_many_lists(averages: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="2 decays need as many lists"):
        ema_update_(averages, [torch.ones(1)], [0.9, 0.5])


@pytest.mark.parametrize(
    ("average", "value"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.complex64),
    ],
)
def test_an_average_that_would_round_its_steps_away_is_refused(
    average: torch.dtype, value: torch.dtype
) -> None:
    with pytest.raises(TypeError, match="rounded away"):
        ema_update_([torch.ones(1, dtype=average)], [torch.ones(1, dtype=value)], 0.9)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="copy them"):
        ema_update_([torch.ones(1)], [torch.ones(1, dtype=torch.int64)], 0.9)


def test_a_refused_call_changes_nothing() -> None:
    averages = [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match="average 1 has shape"):
        ema_update_(averages, [torch.zeros(2), torch.zeros(3)], 0.9)
    assert _equal(averages, [torch.ones(2)] * 2)


def test_lists_that_passed_are_looked_at_again_when_a_tensor_is_another() -> None:
    averages, values = [torch.ones(2), torch.ones(2)], [torch.zeros(2), torch.zeros(2)]
    ema_update_(averages, values, 0.5)
    values[1] = torch.zeros(1)  # torch itself would broadcast it
    with pytest.raises(ValueError, match="average 1 has shape"):
        ema_update_(averages, values, 0.5)


def test_parameters_that_change_their_dtype_in_place_are_looked_at_again() -> None:
    module = nn.Linear(3, 2)
    averages = [torch.zeros_like(x) for x in module.parameters()]
    values = list(module.parameters())
    with torch.no_grad():
        ema_update_(averages, values, 0.5)
        module.bfloat16()
        ema_update_(averages, values, 0.0)
    assert _equal(averages, [x.detach().float() for x in values])


def test_what_is_remembered_keeps_no_tensor_alive() -> None:
    averages, values = _pairs()
    ema_update_(averages, values, 0.5)
    watched = [weakref.ref(x) for x in (*averages, *values)]
    del averages, values
    assert [x() for x in watched] == [None] * len(watched)


def test_an_average_stays_an_ordinary_tensor() -> None:
    average, weight = torch.ones(2), torch.ones(2, requires_grad=True)
    loss = (average * weight).sum()
    with torch.no_grad():
        ema_update_([average], [weight], 0.5)
    assert not average.is_inference()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "lists", [(None, [torch.ones(1)]), ({"a": 1}, []), ([], {"a": 1}), ([], 1)]
)
def test_what_is_no_list_is_refused(lists: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="give a list of tensors"):
        ema_update_(*lists, 0.9)


def test_of_several_decays_each_has_a_list() -> None:
    with pytest.raises(TypeError, match="averages are a dict"):
        ema_update_([{"a": torch.ones(1)}], [torch.ones(1)], [0.9])
