from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import (
    FactoredState,
    adamp_update,
    adamp_update_,
    came_update,
    came_update_,
    came_vector_update,
    clip_coefficient,
    encode_state,
    lamb_update,
    lamb_update_,
    lars_update,
    lars_update_,
    radial_part,
    zero_state,
)

SHAPES: list[tuple[int, ...]] = [(3, 4), (5,), (), (2, 1, 3), (1, 1), (0, 3), (300, 60)]
MATRICES: list[tuple[int, ...]] = [(3, 4), (2, 1, 3), (1, 1), (0, 3), (4, 0), (300, 60)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("lamb", {}),
    ("lamb", {"norm_range": (0.5, 2.0), "trust_clip": 1.5, "maximize": True}),
    ("lamb", {"trust_ratio": False, "bias_correction": False, "weight_decay": 0.0}),
    ("lamb", {"lr": torch.tensor(0.1), "clip": torch.tensor(0.3)}),
    ("lars", {}),
    ("lars", {"nesterov": True, "maximize": True, "lr": torch.tensor(0.1)}),
    ("lars", {"larc": True, "lr_in_momentum": True}),
    ("lars", {"trust_ratio": False}),
    ("adamp", {"weight_decay": 0.1}),
    ("adamp", {"delta": 0.8, "lr": torch.tensor(0.1)}),
    ("adamp", {"delta": 10.0, "weight_decay": 0.1, "nesterov": True, "maximize": True}),
    ("came", {"weight_decay": 0.1}),
    ("came", {"lr": torch.tensor(0.1), "maximize": True, "clip_threshold": 0.1}),
    ("came_vector", {"weight_decay": 0.1, "maximize": True}),
]


def _states(kind: str, weights: list[Tensor]) -> list[list[Any]]:
    zeros = [[torch.zeros_like(w) for w in weights] for _ in range(1 + (kind != "lars"))]
    if kind != "came":
        return zeros
    lengths = [(len(w), w.shape[1:].numel()) * 2 for w in weights]
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    factors = [FactoredState(*(torch.zeros(n, dtype=wide) for n in each)) for each in lengths]
    return [zeros[0], factors]


def _compare(found: Any, expected: Any, dtype: torch.dtype) -> None:
    if isinstance(found, FactoredState):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
        return
    # A number of bfloat16 may be rounded the other way.
    limits = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **limits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_a_list_is_updated_as_each_of_its_parameters(
    kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    settings = {"lr": 0.1} | options
    together = getattr(functional, f"{kind}_update_")
    alone = getattr(functional, f"{kind}_update")
    shapes = MATRICES if kind == "came" else SHAPES
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    lists = [[w.clone() for w in weights], *_states(kind, weights)]
    rows = list(zip(weights, *_states(kind, weights), strict=True))
    for t in range(1, 5):
        grads = [torch.randn_like(w) for w in weights]
        steps = [[torch.tensor(float(t))] * len(grads)] if kind in ("lamb", "adamp") else []
        before = [g.clone() for g in grads]
        together(lists[0], grads, *lists[1:], *steps, **settings)
        count = [t] if steps else []
        rows = [
            alone(w, g, *states, *count, **settings)
            for (w, *states), g in zip(rows, grads, strict=True)
        ]
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    for i, row in enumerate(rows):
        for column, expected in zip(lists, row, strict=True):
            _compare(column[i], expected, dtype)


@pytest.mark.parametrize("strided", [False, True])
def test_tensors_of_any_strides_and_dtypes_are_updated_alike(strided: bool) -> None:
    weight, grad = torch.randn(40, 30, dtype=torch.float64), torch.randn(40, 30)
    lists = [[x.t().clone().t() if strided else x.clone()] for x in (weight, grad)]
    moments = [[torch.zeros(40, 30)], [torch.zeros(40, 30)]]
    lamb_update_(*lists, *moments, [torch.tensor(1.0)], lr=0.1)
    expected, *_ = lamb_update(weight, grad, torch.zeros(40, 30), torch.zeros(40, 30), 1, lr=0.1)
    torch.testing.assert_close(lists[0][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lamb", "lars", "adamp", "came", "came_vector"])
@pytest.mark.parametrize("of_weights", [False, True])
def test_zeros_make_no_nan(kind: str, of_weights: bool) -> None:
    weight = torch.zeros(3, 4) if of_weights else torch.ones(3, 4)
    grad = torch.ones(3, 4) if of_weights else torch.zeros(3, 4)
    states = [x[0] for x in _states(kind, [weight])]
    step = [1.0] if kind in ("lamb", "adamp") else []
    update = getattr(functional, f"{kind}_update")
    moved, *_ = update(weight, grad, *states, *step, lr=0.1, weight_decay=0.0)
    assert moved.isfinite().all()
    assert torch.equal(moved, weight) != of_weights


@pytest.mark.parametrize("zero", [0, 1])
def test_a_ratio_with_a_norm_of_zero_is_one(zero: int) -> None:
    tensors = [torch.ones(4), torch.ones(4)]
    tensors[zero] = torch.zeros(4)
    weight = tensors[0].clone()
    moments = [torch.zeros(4)], [torch.zeros(4)]
    found = lamb_update_(
        [weight], tensors[1:], *moments, [torch.tensor(1.0)], lr=0.1, weight_decay=0.0
    )
    assert found.item() == 1
    _, buffer = lars_update(*tensors, torch.zeros(4), lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(buffer, tensors[1])


def test_a_gradient_that_is_no_number_spoils_no_other_entry() -> None:
    grad = torch.tensor([1.0, torch.nan, -1.0])
    for moved in (
        lamb_update(torch.ones(3), grad, torch.zeros(3), torch.zeros(3), 1, lr=0.1)[0],
        lars_update(torch.ones(3), grad, torch.zeros(3), lr=0.1)[0],
    ):
        assert moved.isfinite().tolist() == [True, False, True]


def test_lamb_moves_weights_by_the_same_share_whatever_their_scale() -> None:
    weight, grad = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    zeros = torch.zeros_like(weight)
    for scale in (0.01, 1.0, 100.0):
        moved, *_ = lamb_update(scale * weight, grad, zeros, zeros, 1, lr=0.1, weight_decay=0.0)
        assert ((moved - scale * weight).norm() / (scale * weight).norm()).item() == (
            pytest.approx(0.1, rel=1e-12)
        )


def test_larc_never_steps_further_than_sgd() -> None:
    weight, grad = torch.full((4,), 100.0), torch.full((4,), 0.01)
    settings: dict[str, Any] = {"lr": 0.1, "trust_coefficient": 1.0, "weight_decay": 0.0}
    free, _ = lars_update(weight, grad, torch.zeros(4), **settings)
    held, _ = lars_update(weight, grad, torch.zeros(4), **settings, larc=True)
    torch.testing.assert_close(held, weight - 0.1 * grad)
    assert (weight - free).norm() > 1000 * (weight - held).norm()


def test_both_forms_of_lars_part_when_the_rate_changes() -> None:
    def run(rates: tuple[float, float], *, inside: bool) -> Tensor:
        weight, buffer = torch.ones(3), torch.zeros(3)
        for rate in rates:
            grad = torch.tensor([1.0, -2.0, 3.0])
            weight, buffer = lars_update(weight, grad, buffer, lr=rate, lr_in_momentum=inside)
        return weight

    torch.testing.assert_close(run((0.1, 0.1), inside=True), run((0.1, 0.1), inside=False))
    assert not torch.allclose(run((0.1, 1.0), inside=True), run((0.1, 1.0), inside=False))


def _grown(update: Callable[[Tensor, Tensor, int], Tensor]) -> float:
    """Growth of a weight's norm over 50 steps on a loss that is blind to it."""
    weight = torch.randn(8, 16, dtype=torch.float64)
    start = weight.norm(dim=1)
    for t in range(1, 51):
        grad = torch.randn_like(weight)
        grad -= (grad * weight).sum(1, True) / weight.square().sum(1, True) * weight
        weight = update(weight, grad, t)
    return (weight.norm(dim=1) / start - 1).mean().item()


def test_adamp_lets_scale_invariant_weights_grow_by_its_steps_alone() -> None:
    states: list[Tensor] = [torch.zeros(8, 16, dtype=torch.float64)] * 2
    # Momentum, made of gradients at other weights, has a part along the weights of now.
    settings: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.9), "eps": 0.0}

    def adamp(weight: Tensor, grad: Tensor, t: int, delta: float = 0.1) -> Tensor:
        weight, *states[:] = adamp_update(weight, grad, *states, t, delta=delta, **settings)
        return weight

    def one_step_of_growth(delta: float) -> float:
        weight, grad = torch.randn(2, 8, 16, dtype=torch.float64)
        grad -= (grad * weight).sum(1, True) / weight.square().sum(1, True) * weight
        mean, square = weight + grad, torch.ones_like(weight)
        moved, *_ = adamp_update(weight, grad, mean, square, 9, delta=delta, **settings)
        return abs(((moved - weight) * weight).sum().item())

    assert one_step_of_growth(0.1) < 1e-12 < 0.1 < one_step_of_growth(0.0)
    projected = _grown(adamp)
    states[:] = [torch.zeros(8, 16, dtype=torch.float64)] * 2
    free = _grown(lambda w, g, t: adamp(w, g, t, delta=0.0))
    assert projected < free


def test_a_gradient_along_the_weights_is_not_projected() -> None:
    weight = torch.randn(5, 4)
    assert not radial_part(weight, weight, weight)[1]
    assert not radial_part(weight[0], torch.randn(4), weight[0])[1]


def test_came_trusts_rows_that_agree_with_their_past() -> None:
    # Row 0 has the same gradient all the time, row 1 one of a random sign.
    weight, mean = torch.zeros(2, 64), torch.zeros(2, 64)
    state = FactoredState(*(torch.zeros(n) for n in (2, 64, 2, 64)))
    steady = torch.ones(64)
    for _ in range(100):
        grad = torch.stack([steady, torch.randn(64).sign()])
        weight, mean, state = came_update(weight, grad, mean, state, lr=1e-3, betas=(0.9, 0.9, 0.9))
    share = weight.abs().mean(1) / mean.abs().mean(1)
    assert share[0] > 3 * share[1]


def _split(x: Tensor) -> list[Tensor]:
    return list(x.split([2, 0, 3]))


def _on_shards(kind: str, shards: list[list[Any]], **settings: Any) -> list[Tensor]:
    """Update each shard with the sums of all: rounds in which one more call is right."""
    update = getattr(functional, f"{kind}_update_")
    calls = 3 if kind == "came" else 1
    totals: list[Tensor] = []
    for done in range(calls + 1):
        sums: list[Tensor] = []

        def reduce(mine: Tensor, counter: list[int], kept: list[Tensor] = sums) -> Tensor:
            counter[0] += 1
            if counter[0] - 1 < len(totals):
                return totals[counter[0] - 1]
            if counter[0] - 1 == len(totals):
                kept.append(mine.clone())
            return mine

        rows = [[_clone(x) for x in row] for row in shards]
        for row in rows:
            counter = [0]
            columns = [[x] for x in row]
            update(*columns, **settings, reduce=lambda x, c=counter: reduce(x, c))
        if done < calls:
            totals.append(torch.stack(sums).sum(0))
    return [row[0] for row in rows]


def _clone(x: Any) -> Any:
    return FactoredState(*(y.clone() for y in x)) if isinstance(x, FactoredState) else x.clone()


@pytest.mark.parametrize("delta", [0.1, 0.8, 10.0])
@pytest.mark.parametrize("kind", ["lamb", "lars", "adamp", "came", "came_vector"])
def test_shards_whose_sums_are_reduced_move_as_the_whole(kind: str, delta: float) -> None:
    weight, grad, mean, square = torch.randn(4, 5, 3, dtype=torch.float64)
    step = [torch.tensor(2.0)] if kind in ("lamb", "adamp") else []
    settings: dict[str, Any] = {"lr": 0.1} | ({"delta": delta} if kind == "adamp" else {})
    others: list[Any] = [] if kind == "lars" else [square.abs()]
    parts = [_split(x) for x in (weight, grad, mean, *others)]
    if kind == "came":
        means = [torch.rand(n, dtype=torch.float64) for n in (5, 3, 5, 3)]
        others = [FactoredState(*means)]
        rows = [_split(means[0]), _split(means[2])]
        parts[3] = [
            FactoredState(a, means[1].clone(), b, means[3].clone())
            for a, b in zip(*rows, strict=True)
        ]
    shards = [[*row, *step] for row in zip(*parts, strict=True)]
    whole = getattr(functional, f"{kind}_update")(weight, grad, mean, *others, *step, **settings)
    torch.testing.assert_close(torch.cat(_on_shards(kind, shards, **settings)), whole[0])


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4", "fp8"])
def test_states_in_few_bits_follow_the_plain_ones(format: str) -> None:
    torch.manual_seed(0)
    plain = [torch.randn(64, 64)]
    few = [plain[0].clone()]
    kept = [[torch.zeros(64, 64)], [torch.zeros(64, 64)]]
    packed = [[zero_state((64, 64), format, signed=x)] for x in (True, False)]
    start = plain[0].clone()
    for t in range(1, 21):
        step = [torch.tensor(float(t))]
        grads = [torch.randn(64, 64) + start]
        lamb_update_(plain, grads, *kept, step, lr=1e-3)
        lamb_update_(few, grads, *packed, step, lr=1e-3)
    away = (few[0] - plain[0]).norm() / (plain[0] - start).norm()
    assert away < {"bfloat16": 0.02, "int8": 0.1, "int4": 0.5, "fp8": 0.1}[format]


def test_a_momentum_in_few_bits_takes_part_in_lars_before_it_is_rounded() -> None:
    weight, grad, buffer = torch.randn(3, 4, 64)
    state = encode_state(buffer, "int8")
    given = functional.decode_state(state)
    expected, moved = lars_update(weight, grad, given, lr=0.1)
    lars_update_([weight], [grad], [state], lr=0.1)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(state.codes, encode_state(moved, "int8").codes)


@pytest.mark.parametrize("kind", ["lamb", "lars", "adamp", "came", "came_vector"])
def test_empty_lists_are_nothing_to_do(kind: str) -> None:
    lists: list[list[Tensor]] = [
        [] for _ in range(3 + (kind != "lars") + (kind in ("lamb", "adamp")))
    ]
    assert getattr(functional, f"{kind}_update_")(*lists, lr=0.1).shape == (0,)


def test_lists_that_do_not_fit_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="2 params and 1 grads"):
        lars_update_([x, x], [x], [x, x], lr=0.1)
    with pytest.raises(ValueError, match="must be equal"):
        adamp_update_([x], [x[:1]], [x], [x], [torch.tensor(1.0)], lr=0.1)


def test_came_refuses_what_is_no_matrix() -> None:
    vector, factors = torch.ones(3), FactoredState(*torch.ones(4, 3).unbind())
    with pytest.raises(ValueError, match="came_vector_update"):
        came_update(vector, vector, vector, factors, lr=0.1)
    with pytest.raises(ValueError, match="came_vector_update_"):
        came_update_([vector], [vector], [vector], [factors], lr=0.1)
    square = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"must have \[3, 2, 3, 2\]"):
        came_update_([square], [square], [square], [factors], lr=0.1)


def test_an_update_that_is_too_long_is_clipped_to_a_root_mean_square() -> None:
    weight = torch.zeros(50)
    moved, mean, _ = came_vector_update(
        weight, torch.randn(50), weight, weight, lr=1.0, betas=(0.0, 0.999, 0.9999)
    )
    assert mean.square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(moved, -mean)


def test_a_norm_to_clip_to_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        clip_coefficient(torch.tensor(1.0), 0.0)
