"""LAMB, LARS, AdamP and CAME with the options of the family: errors, random bits, scaled losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.functional_parts import update_lists
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import FactoredState, QuantizedState, join_weight, split_weight

KINDS = ["lamb", "lars", "adamp", "came", "came_vector"]
TRUSTED = {"lamb": 1.0, "lars": 1.0, "adamp": 0.0, "came": 1.0, "came_vector": 1.0}
SHAPES: list[tuple[int, ...]] = [(3, 4), (2, 1, 3), (40, 30)]
FORMATS = ["float32", "bfloat16", "int8", "int4", "fp8"]
# Rates at which a step is below 2⁻⁹, half a place in bfloat16 of a weight in [1, 2).
SLOW = {"lamb": 5e-4, "lars": 0.05, "adamp": 5e-4, "came": 1e-5, "came_vector": 1e-3}

every_update = pytest.mark.parametrize("kind", KINDS)


def _states(kind: str, shapes: list[tuple[int, ...]], format: str = "float32") -> list[list[Any]]:
    def zeros(*, signed: bool) -> list[Any]:
        if format == "float32":
            return [torch.zeros(shape) for shape in shapes]
        return [functional.zero_state(shape, format, signed=signed) for shape in shapes]

    if kind == "lars":
        return [zeros(signed=True)]
    if kind != "came":
        return [zeros(signed=True), zeros(signed=False)]
    lengths = [(shape[0], torch.Size(shape[1:]).numel()) * 2 for shape in shapes]
    return [zeros(signed=True), [FactoredState(*map(torch.zeros, each)) for each in lengths]]


def _update(
    kind: str, weights: list[Tensor], grads: list[Tensor], states: Any, t: float = 1, **given: Any
) -> Tensor:
    steps = [torch.tensor(float(t)) for _ in weights]
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0} | given
    update = getattr(functional, f"{kind}_update_")
    found: Tensor = update(weights, grads, *states, steps, **settings)
    return found


def _parts(*lists: Any) -> list[Tensor]:
    """Every tensor of lists of tensors and states."""
    found: list[Tensor] = []
    for x in (x for column in lists for x in column):
        if isinstance(x, QuantizedState):
            found += [x.codes, x.scales]
        else:
            found += [x] if isinstance(x, Tensor) else list(x)
    return found


def _bits(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone().view(torch.uint8) if x.dim() else x.clone() for x in tensors]


def _normal() -> list[Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


@every_update
def test_steps_too_small_for_bfloat16_add_up_with_errors(kind: str) -> None:
    pairs = [split_weight(torch.rand(60, 50) + 1.25)]
    rounded, errors = ([x.clone() for x in column] for column in zip(*pairs, strict=True))
    start, grads = [join_weight(*pair) for pair in pairs], [torch.randn(60, 50).sign()]
    exact, plain = [x.clone() for x in start], [x.clone() for x in rounded]
    runs = ((exact, {}), (plain, {}), (rounded, {"weight_errors": errors}))
    for weights, options in runs:
        states = _states(kind, [(60, 50)])
        for t in range(1, 51):
            _update(kind, weights, grads, states, t, lr=SLOW[kind], **options)
    bound = 50 * 2.0**-16 * 2  # half a place of 24 bits a step, of weights below 2
    assert torch.equal(plain[0], pairs[0][0])
    assert (exact[0] - start[0]).abs().mean() > 4 * bound
    assert (join_weight(rounded[0], errors[0]) - exact[0]).abs().max() < bound


@pytest.mark.parametrize("kind", ["lamb", "lars"])
def test_norms_are_those_of_both_parts_of_a_weight(kind: str) -> None:
    weight, grad = torch.full((40, 30), 1.0037), torch.randn(40, 30)
    rounded, error = split_weight(weight)
    exact, plain, both = (
        _update(kind, [x.clone()], [grad], _states(kind, [(40, 30)]), **options)
        for x, options in ((weight, {}), (rounded, {}), (rounded, {"weight_errors": [error]}))
    )
    torch.testing.assert_close(both, exact, rtol=2.0**-15, atol=0)
    assert (plain / exact - 1).abs() > 1e-3


@every_update
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_no_bit_changes_where_infinities_were_found(
    kind: str, format: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if waits:  # as for a number on another device
        monkeypatch.setattr(update_lists, "is_known", lambda _: False)
    pairs = [split_weight(x) for x in _normal()]
    weights, errors = ([*column] for column in zip(*pairs, strict=True))
    grads, states = _normal(), _states(kind, SHAPES, format)
    _update(kind, weights, grads, states, weight_errors=errors)
    grads[0][0, 0], grads[1][0, 0] = torch.nan, torch.inf
    kept = _bits(_parts(weights, errors, *states))
    options = {"weight_errors": errors, "found_inf": torch.tensor([1.0])}
    found = _update(kind, weights, grads, states, 2, **options)
    after = _bits(_parts(weights, errors, *states))
    assert all(torch.equal(x, y) for x, y in zip(after, kept, strict=True))
    assert found.tolist() == [TRUSTED[kind]] * len(SHAPES)
    options["found_inf"] = torch.tensor([0.0])
    _update(kind, weights, _normal(), states, 2, **options)
    assert not torch.equal(_bits(weights)[2], kept[2])


@every_update
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_gradients_are_divided_and_clipped_first(kind: str, dtype: torch.dtype) -> None:
    weights, grads = [[x.to(dtype) for x in _normal()] for _ in range(2)]
    states = _states(kind, SHAPES)
    other, scaled = [x.clone() for x in weights], [8 * x for x in grads]
    others = _states(kind, SHAPES)
    kept = [x.clone() for x in scaled]
    options = {"grad_scale": torch.tensor([4.0]), "clip": torch.tensor(0.5)}
    found = _update(kind, other, scaled, others, **options)
    expected = _update(kind, weights, grads, states)
    _same = torch.testing.assert_close
    _same(_parts(other, *others, scaled), _parts(weights, *states, kept))
    _same(found, expected)


@every_update
def test_random_rounding_is_right_on_average(kind: str) -> None:
    weight = torch.full((200, 100), 1.5, dtype=torch.bfloat16)
    grad, exact, states = torch.ones(200, 100), weight.float(), _states(kind, [(200, 100)])
    _update(kind, [exact], [grad], _states(kind, [(200, 100)]), lr=SLOW[kind])
    options = {"rounding": "stochastic", "seed": 1}
    _update(kind, [weight], [grad], states, lr=SLOW[kind], **options)
    moved = weight.float()
    assert len(moved.unique()) == 2
    assert (moved.mean() - exact.mean()).abs() < 4 * moved.std() / len(moved.flatten()) ** 0.5


@every_update
def test_random_bits_differ_between_parameters_and_steps(kind: str) -> None:
    def rounded(t: float, stream: int = 0) -> list[Tensor]:
        weights = [torch.full((40, 30), 1.5, dtype=torch.bfloat16) for _ in range(2)]
        grads, states = [torch.ones(40, 30)] * 2, _states(kind, [(40, 30)] * 2)
        options = {"bias_correction": False} if kind == "lamb" else {}
        settings = {"lr": SLOW[kind], "rounding": "stochastic", "stream": stream} | options
        _update(kind, weights, grads, states, t, **settings)
        return weights

    first, second = rounded(1.0)
    assert not torch.equal(first, second)
    assert not torch.equal(rounded(2.0)[0], first)
    assert torch.equal(rounded(1.0, stream=4)[0], second)
