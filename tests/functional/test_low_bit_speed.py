"""Updates in parts that a CPU's cache holds are those of whole tensors, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import assert_accurate
from torch import Tensor

from lightning_ext.functional import (
    QuantizedState,
    adamw_update,
    adamw_update_,
    decode_state,
    encode_state,
    lion_update,
    lion_update_,
    sgd_update,
    sgd_update_,
    split_weight,
    zero_state,
)
from lightning_ext.functional._updates import _row_parts
from lightning_ext.functional._updates._checks import Options

FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")
SHAPES = ((3, 256), (37, 29), (1, 1025), (1025,), (5, 7, 31))

Row = list[Any]


def _row(shape: tuple[int, ...], format: str, dtype: torch.dtype = torch.float32) -> Row:
    draw = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.randn(shape, generator=draw) for _ in range(4))
    states = [encode_state(m, format), encode_state(v.square(), format, signed=False)]
    return [w.to(dtype), g.to(dtype), *states]


def _adamw(row: Row, **options: Any) -> list[Tensor]:
    """What the step leaves in memory."""
    adamw_update_(*([x] for x in row), [torch.tensor(3.0)], lr=0.1, **options)
    return _memory(row)


def _memory(row: Row) -> list[Tensor]:
    states = [(x.codes, x.scales) if isinstance(x, QuantizedState) else (x,) for x in row]
    return [x for pair in states for x in pair]


def _in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_row_parts, "_PART", 512)


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("format", FORMATS)
def test_a_long_row_comes_in_parts(format: str) -> None:
    most = 2**16 * torch.get_num_threads()
    w, g, m, v = _row((2, most + 5), format)
    parts = _row_parts.parts_of((w, None, g, m, v), _row_parts.Bits(Options(), None, 0))
    assert [part[0].numel() for part in parts] == [most, most, 10]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_do_not_show(
    shape: tuple[int, ...], format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _adamw(_row(shape, format))
    _in_parts(monkeypatch)
    _assert_same(_adamw(_row(shape, format)), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_parts_do_not_show_where_gradients_are_scaled(
    found: float, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"found_inf": torch.tensor(found), "grad_scale": 8.0, "clip": 0.5}
    expected = _adamw(_row((37, 29), format), **options)
    _in_parts(monkeypatch)
    _assert_same(_adamw(_row((37, 29), format), **options), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_parts_do_not_show_in_weights_rounded_at_random(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rounding": "stochastic", "seed": 3, "stream": 4}
    expected = _adamw(_row((37, 29), format, torch.bfloat16), **options)
    _in_parts(monkeypatch)
    _assert_same(_adamw(_row((37, 29), format, torch.bfloat16), **options), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_parts_do_not_show_in_the_errors_of_weights(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> list[Tensor]:
        w, *others = _row((37, 29), format)
        weight, error = split_weight(w)
        return [*_adamw([weight, *others], weight_errors=[error]), error]

    expected = step()
    _in_parts(monkeypatch)
    _assert_same(step(), expected)


def test_a_second_moment_in_four_bits_is_reduced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _in_parts(monkeypatch)
    sizes = []

    def reduce(maxima: Tensor) -> Tensor:
        sizes.append(len(maxima))
        return maxima

    *row, v = _row((37, 29), "int4")
    _adamw([*row, v._replace(reduce=reduce)])
    assert sizes == [29]


@pytest.mark.parametrize("format", FORMATS)
def test_the_loops_of_torch_are_near_the_formula(format: str) -> None:
    w, g, m, v = _row((37, 29), format)
    moments = [encode_state(x, "float32") for x in map(_numbers, (m, v))]
    wide = [x.double() for x in (w, g, *map(_numbers, (m, v)))]
    truth = adamw_update(*wide, 3, lr=0.1)
    _adamw([w, g, m, v])
    assert_accurate(w, truth[0])
    _adamw([w.clone(), g, *moments])
    for state, expected in zip(moments, truth[1:], strict=True):
        assert_accurate(state.codes, expected)


def _numbers(state: QuantizedState) -> Tensor:
    return decode_state(state).clone()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_by_the_loops_of_torch_is_near_the_formula(format: str, maximize: bool) -> None:
    w, g, m, _ = _row((37, 29), format)
    wide = [x.double() for x in (w, g, _numbers(m))]
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "maximize": maximize}
    lion_update_([w], [g], [m], [torch.tensor(1.0)], **settings)
    assert_accurate(w, lion_update(*wide, **settings)[0])


@pytest.mark.parametrize("step", [1.0, 2.0])
@pytest.mark.parametrize("format", FORMATS)
def test_sgd_by_the_loops_of_torch_is_near_the_formula(format: str, step: float) -> None:
    w, g, b, _ = _row((37, 29), format)
    wide = [x.double() for x in (w, g, _numbers(b))]
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    sgd_update_([w], [g], [b], [torch.tensor(step)], **settings)
    assert_accurate(w, sgd_update(*wide, step, **settings)[0])


def test_powers_have_a_table_that_agrees_with_the_formula() -> None:
    x = torch.randn(200, 128) * torch.logspace(0, 3, 200)[:, None] ** torch.randn(200, 128)
    state = encode_state(x, "fp8")
    slow = state._replace(scales=state.scales.clone().requires_grad_())
    assert state.scales[:, 1].unique().numel() > 4
    assert torch.equal(_numbers(state), _numbers(slow).detach())


def test_a_group_of_zeros_does_not_widen_the_range() -> None:
    x = torch.tensor([0.0, 0.5, 1.0] * 50)
    sparse, dense = encode_state(x, "fp8"), encode_state(x[x > 0], "fp8")
    assert sparse.scales[0].tolist() == dense.scales[0].tolist()
    assert (
        zero_state((3,), "fp8").scales.tolist()
        == encode_state(torch.zeros(3), "fp8").scales.tolist()
    )
