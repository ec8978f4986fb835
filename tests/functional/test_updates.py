"""AdamW, Lion and SGD: as published, alike in lists, and careful with what they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness.functional_parts import CACHED, foreach_updates
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import (
    adamw_update,
    adamw_update_,
    decode_state,
    encode_state,
    lion_update,
    lion_update_,
    sgd_update,
    sgd_update_,
    split_weight,
)

SHAPES = [(3, 4), (5,), (), (0, 2), (7, 1, 2)]
ADAMW: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0, "betas": (0.0, 0.0)},
    {"weight_decay": 0.3, "betas": (0.5, 0.7), "eps": 1e-3, "maximize": True},
    {"weight_decay": 0.3, "decoupled_weight_decay": False},
]
SGD: list[dict[str, Any]] = [
    {"weight_decay": 0.3, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
]
LION: list[dict[str, Any]] = [{}, {"betas": (0.0, 0.5)}, {"weight_decay": 0.3, "maximize": True}]
ALL = [*(("adamw", x) for x in ADAMW), *(("lion", x) for x in LION), *(("sgd", x) for x in SGD)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}

Lists = list[list[Tensor]]


def _lists(
    kind: str,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> Lists:
    """Parameters, gradients, moments and steps; the dtype of the k-th list is the k-th."""
    count = {"adamw": 4, "lion": 3, "sgd": 3}[kind]
    lists = [
        [torch.randn(s, dtype=torch.float64).to(dtypes[k % len(dtypes)]) for s in shapes]
        for k in range(count)
    ]
    if kind == "adamw":
        lists[3] = [x.abs() for x in lists[3]]
    return [*lists, [torch.tensor(1.0 + k) for k in range(len(shapes))]]


def _one(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    if kind != "lion":
        return {"adamw": adamw_update, "sgd": sgd_update}[kind]
    return lambda w, g, m, step, **settings: lion_update(w, g, m, **settings)


def _all(kind: str) -> Callable[..., None]:
    return {"adamw": adamw_update_, "lion": lion_update_, "sgd": sgd_update_}[kind]


def _copy(lists: Lists) -> Lists:
    return [[x.clone() for x in column] for column in lists]


def _expected(kind: str, lists: Lists, **settings: Any) -> Lists:
    rows = [_one(kind)(*row, lr=0.1, **settings) for row in zip(*_copy(lists), strict=True)]
    weights, *moments = ([*column] for column in zip(*rows, strict=True))
    return [weights, lists[1], *moments, lists[-1]]


def _assert_same(found: Lists, expected: Lists, **bounds: float) -> None:
    for column, other in zip(found, expected, strict=True):
        for x, y in zip(column, other, strict=True):
            torch.testing.assert_close(x, y, **bounds)


def _optimizer(kind: str, weights: list[Tensor], settings: dict[str, Any]) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(weights, lr=0.1, foreach=False, **settings)
    settings = dict(settings)
    decoupled = settings.pop("decoupled_weight_decay", True)
    settings.setdefault("weight_decay", 1e-2)
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    return optimizer_class(weights, lr=0.1, foreach=False, **settings)


@pytest.mark.parametrize(("kind", "settings"), [x for x in ALL if x[0] != "lion"])
def test_fifty_steps_are_those_of_torch(kind: str, settings: dict[str, Any]) -> None:
    weights, *_ = _lists(kind)
    outside = [torch.nn.Parameter(x.clone()) for x in weights]
    optimizer = _optimizer(kind, outside, settings)
    lists = [[torch.zeros_like(x) for x in weights] for _ in range(2 if kind == "adamw" else 1)]
    for t in range(1, 51):
        grads = [torch.randn_like(x) for x in weights]
        for parameter, grad in zip(outside, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        steps = [torch.tensor(float(t)) for _ in weights]
        _all(kind)(weights, grads, *lists, steps, lr=0.1, **settings)
        _assert_same([weights], [[x.detach() for x in outside]], **EXACT)


@pytest.mark.parametrize("settings", LION)
def test_fifty_steps_of_lion_are_the_pseudo_code(settings: dict[str, Any]) -> None:
    weights, _, moments, _ = _lists("lion")
    theta, m = [x.clone() for x in weights], [x.clone() for x in moments]
    beta1, beta2 = settings.get("betas", (0.9, 0.99))
    for _ in range(50):
        grads = [torch.randn_like(x) for x in weights]
        lion_update_(weights, grads, moments, lr=0.1, **settings)
        for i, grad in enumerate(grads):
            g = -grad if settings.get("maximize") else grad
            c = beta1 * m[i] + (1 - beta1) * g
            theta[i] = theta[i] - 0.1 * (c.sign() + settings.get("weight_decay", 0.0) * theta[i])
            m[i] = beta2 * m[i] + (1 - beta2) * g
    _assert_same([weights, moments], [theta, m], **EXACT)


@pytest.mark.parametrize("dtypes", [[torch.float64], [torch.float32], [torch.bfloat16]], ids=str)
@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_a_list_is_done_as_its_parameters_are(
    kind: str, settings: dict[str, Any], dtypes: list[torch.dtype]
) -> None:
    lists = _lists(kind, dtypes)
    expected = _expected(kind, lists, **settings)
    _all(kind)(*lists, lr=0.1, **settings)
    _assert_same(lists, expected)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_dtypes_may_differ_in_one_list_and_one_parameter(
    kind: str, settings: dict[str, Any]
) -> None:
    halves = [
        _lists(kind, x) for x in ([torch.bfloat16, torch.float16, torch.float32], [torch.float64])
    ]
    lists = [a + b for a, b in zip(*halves, strict=True)]
    expected = _expected(kind, lists, **settings)
    _all(kind)(*lists, lr=0.1, **settings)
    _assert_same(lists, expected)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float32]], ids=str)
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_long_tensors_are_done_in_parts(kind: str, dtypes: list[torch.dtype]) -> None:
    lists = _lists(kind, dtypes, [(7,), (2 * CACHED + 3,), (CACHED,), (3, 5)])
    factors = {"clip": torch.tensor(0.5), "grad_scale": torch.tensor([4.0])}
    scaled = [lists[0], [x / 8 for x in lists[1]], *lists[2:]]
    expected = _expected(kind, scaled)
    _all(kind)(*lists, lr=0.1, **factors)
    _assert_same([lists[0], *lists[2:]], [expected[0], *expected[2:]])


@pytest.mark.parametrize("change", ["transposed", "every second entry"])
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_views_are_changed_in_place(kind: str, change: str) -> None:
    lists = _lists(kind, shapes=[(3, 4)])
    expected = _expected(kind, lists)
    held = lists[0][0].T.contiguous().T
    if change != "transposed":
        held = torch.stack([lists[0][0], torch.full((3, 4), 7.0, dtype=torch.float64)], -1)[..., 0]
    _all(kind)([held], *lists[1:], lr=0.1)
    torch.testing.assert_close(held, expected[0][0], **EXACT)
    assert change == "transposed" or (held._base[..., 1] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_gradients_and_steps_stay(kind: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    lists = _lists(kind, [dtype])
    kept = _copy(lists)
    factors = {"clip": torch.tensor(0.5), "grad_scale": torch.tensor(4.0)}
    _all(kind)(*lists, lr=0.1, **settings, **factors)
    _assert_same([lists[1], lists[-1]], [kept[1], kept[-1]], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_nothing_changes_where_infinities_were_found(kind: str, dtype: torch.dtype) -> None:
    lists = _lists(kind, [dtype])
    lists[1][0][0] = torch.inf
    kept = _copy(lists)
    _all(kind)(*lists, lr=0.1, found_inf=torch.tensor([1.0]))
    _assert_same(lists, kept, rtol=0, atol=0)
    _all(kind)(*lists, lr=0.1, found_inf=torch.tensor([0.0]))
    assert not torch.equal(lists[0][1], kept[0][1])


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_infinities_found_elsewhere_are_not_waited_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach_updates, "is_skipped", lambda _: False)
    lists = _lists(kind, [torch.bfloat16])
    lists[1][0][0] = torch.nan
    kept = _copy(lists)
    _all(kind)(*lists, lr=0.1, found_inf=torch.tensor([1.0]))
    _assert_same([lists[0], *lists[2:]], [kept[0], *kept[2:]], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_is_the_gradient_after_the_first_step_of_its_parameter(dtype: torch.dtype) -> None:
    buffers, grads = (
        [torch.zeros(3, dtype=dtype) for _ in range(2)],
        [torch.ones(3, dtype=dtype)] * 2,
    )
    steps, weights = (
        [torch.tensor(1.0), torch.tensor(2.0)],
        [torch.zeros(3, dtype=dtype) for _ in range(2)],
    )
    sgd_update_(weights, grads, buffers, steps, lr=0.5, momentum=0.5, dampening=0.75)
    assert [x[0].item() for x in buffers] == [1, 0.25]
    assert [x[0].item() for x in weights] == [-0.5, -0.125]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_the_rate_may_be_a_tensor(kind: str, dtype: torch.dtype) -> None:
    lists = _lists(kind, [dtype])
    other = _copy(lists)
    _all(kind)(*lists, lr=0.1)
    _all(kind)(*other, lr=torch.tensor(0.1))
    _assert_same(other, lists)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_no_parameters_are_no_work(kind: str) -> None:
    _all(kind)(*([] for _ in _lists(kind)), lr=0.1)


def test_a_step_of_lion_is_as_long_as_the_rate_in_every_entry() -> None:
    weight = torch.zeros(4)
    lion_update_([weight], [torch.tensor([1e-30, -1e30, 3.0, 0.0])], [torch.zeros(4)], lr=0.25)
    assert weight.tolist() == [-0.25, 0.25, -0.25, 0.0]


def test_a_change_of_betas_in_flight_keeps_the_corrections() -> None:
    ones = [torch.ones(3, dtype=torch.float64)] * 4  # moments of 1 stay so, whatever the betas
    found = adamw_update(*ones, 5.0, lr=0.1, betas=(0.9, 0.99))
    squared = adamw_update(*ones, torch.tensor(2.5), lr=0.1, betas=(0.9**2, 0.99**2))
    torch.testing.assert_close(squared, found, **EXACT)


def test_moments_take_part_in_a_step_before_they_are_rounded() -> None:
    # v is 1 + 2⁻¹⁰, which bfloat16 rounds to 1.
    w, g, m = torch.zeros(1), torch.ones(1), torch.ones(1)
    v = torch.full((1,), 1.0, dtype=torch.bfloat16)
    settings = {"lr": 1.0, "betas": (0.0, 1 - 2**-10), "eps": 0.0, "weight_decay": 0.0}
    g = torch.full((1,), 2**0.5)
    found, _, kept = adamw_update(w, g, m, v, 1e9, **settings)
    assert kept.item() == 1
    assert abs(found.item() + (2 / (1 + 2**-10)) ** 0.5) < 1e-6


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4", "fp8"])
def test_a_moment_in_a_format_is_read_moved_and_written(format: str) -> None:
    weight, grad, mean = torch.randn(3, 20, 30)
    state = encode_state(mean, format, seed=1)
    expected = lion_update(weight, grad, decode_state(state), lr=0.1)
    lion_update_([weight], [grad], [state], [torch.tensor(4.0)], lr=0.1, seed=7, stream=3)
    torch.testing.assert_close(weight, expected[0])
    kept = encode_state(expected[1], format, seed=7, step=4, stream=3 + 1)
    assert torch.equal(state.codes, kept.codes)
    assert torch.equal(state.scales, kept.scales)


def test_a_first_moment_needs_a_sign() -> None:
    state = functional.zero_state((2,), "int8", signed=False)
    with pytest.raises(ValueError, match="momentum_buffers in a format without a sign"):
        sgd_update_([torch.zeros(2)], [torch.ones(2)], [state], lr=0.1, momentum=0.9)


def _refused(change: Callable[[Lists, dict[str, Any]], None], kind: str = "adamw") -> None:
    lists, options = _lists(kind, [torch.float32]), {"lr": 0.1}
    change(lists, options)
    kept = _copy(lists)
    try:
        _all(kind)(*lists, **options)
    finally:
        for column, other in zip(lists, kept, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(column, other, strict=True))


@pytest.mark.parametrize("place", range(1, 5))
def test_lists_of_other_lengths_are_refused(place: int) -> None:
    with pytest.raises(ValueError, match="got 5 params and 4"):
        _refused(lambda lists, _: lists[place].pop())


@pytest.mark.parametrize("place", range(1, 4))
def test_tensors_of_other_shapes_are_refused(place: int) -> None:
    def change(lists: Lists, _: dict[str, Any]) -> None:
        lists[place][-1] = lists[place][-1].mT

    with pytest.raises(ValueError, match=r"params\[4\] of shape \(7, 1, 2\)"):
        _refused(change)


def test_integers_and_complex_numbers_are_refused() -> None:
    for dtype in (torch.int32, torch.complex64):

        def change(lists: Lists, _: dict[str, Any], dtype: torch.dtype = dtype) -> None:
            lists[1][-1] = lists[1][-1].to(dtype)

        with pytest.raises(TypeError, match=f"does not take {dtype}"):
            _refused(change)


def test_tensors_on_other_devices_are_refused() -> None:
    def change(lists: Lists, _: dict[str, Any]) -> None:
        lists[2][-1] = lists[2][-1].to("meta")

    lists = _lists("adamw")
    change(lists, {})
    with pytest.raises(ValueError, match="parameter 4 on cpu and meta"):
        adamw_update_(*lists, lr=0.1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"betas": (0.9, 1.0)}, "each must lie in"),
        ({"clip": torch.ones(2)}, "clip of shape"),
        ({"rounding": "up"}, "choose 'nearest' or 'stochastic'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        _refused(lambda _, given: given.update(options))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="amsgrad"):
        _refused(lambda _, given: given.update(amsgrad=True))


def test_errors_belong_to_weights_in_bfloat16() -> None:
    errors = [torch.zeros(s, dtype=torch.int8) for s in SHAPES]
    with pytest.raises(TypeError, match=r"torch\.float32 among weights"):
        _refused(lambda _, given: given.update(weight_errors=errors))


def test_random_bits_need_steps() -> None:
    with pytest.raises(ValueError, match="lion_update_ needs steps"):
        lion_update_([], [], [], lr=0.1, rounding="stochastic")


@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.9}, {"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}],
)
def test_sgd_refuses_settings_that_do_not_fit(settings: dict[str, Any]) -> None:
    buffers = None if settings == {"momentum": 0.9} else [torch.zeros(2)]
    with pytest.raises(ValueError, match="momentum="):
        sgd_update_([torch.zeros(2)], [torch.ones(2)], buffers, lr=0.1, **settings)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_steps_too_small_for_bfloat16_add_up_with_errors(kind: str) -> None:
    rounded, error = split_weight(torch.ones(300))
    settings = {"lr": 1e-4} | ({"weight_decay": 0.0} if kind == "adamw" else {})
    for weight, options in ((rounded, {"weight_errors": [error]}), (plain := rounded.clone(), {})):
        moments = [[torch.zeros(300)] for _ in range(2 if kind == "adamw" else 1)]
        for t in range(1, 101):
            lists = [[weight], [torch.ones(300)], *moments, [torch.tensor(float(t))]]
            _all(kind)(*lists, **settings, **options)
    assert plain.eq(1).all()
    joined = functional.join_weight(rounded, error)
    torch.testing.assert_close(joined, torch.full((300,), 0.99), rtol=1e-3, atol=0)


def test_random_rounding_keeps_the_mean() -> None:
    weight, count = torch.ones(20_000, dtype=torch.bfloat16), 16
    for t in range(1, count + 1):
        steps, grads = [torch.tensor(float(t))], [torch.ones(20_000)]
        sgd_update_([weight], grads, None, steps, lr=2**-10, rounding="stochastic", seed=1)
    moved = (1 - weight.float()) / 2**-10
    error = moved.std() / len(moved) ** 0.5
    assert error < 0.1
    assert abs(moved.mean() - count) < 4 * error


def test_random_bits_differ_between_parameters_and_steps() -> None:
    def rounded(step: float, stream: int = 0) -> list[list[float]]:
        weights = [torch.ones(64, dtype=torch.bfloat16) for _ in range(2)]
        grads, steps = [torch.ones(64)] * 2, [torch.tensor(step)] * 2
        sgd_update_(weights, grads, None, steps, lr=2**-9, rounding="stochastic", stream=stream)
        return [x.tolist() for x in weights]

    first, second = rounded(1.0)
    assert first != second
    assert rounded(2.0)[0] != first
    assert rounded(1.0, stream=4)[0] == second
    assert rounded(1.0) == [first, second]


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4", "fp8"])
def test_codes_stay_where_infinities_are_found_elsewhere(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach_updates, "is_skipped", lambda _: False)
    x = torch.randn(40, 30)
    states = [encode_state(x, format), encode_state(x.square(), format, signed=False)]
    kept = [y.clone() for state in states for y in (state.codes, state.scales)]
    lists = [[x], [torch.full_like(x, torch.nan)], [states[0]], [states[1]], [torch.tensor(3.0)]]
    adamw_update_(*lists, lr=0.1, found_inf=torch.tensor([1.0]))
    found = [y for state in states for y in (state.codes, state.scales)]
    assert all(torch.equal(y, z) for y, z in zip(found, kept, strict=True))
