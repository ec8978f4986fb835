"""Options of the family of updates in the kernels of LAMB, LARS, AdamP and CAME."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import launches
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.functional import FactoredState, QuantizedState, split_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEFT_OUT = {
    "lamb_update_": 1.0,
    "lars_update_": 1.0,
    "adamp_update_": 0.0,
    "came_update_": 1.0,
    "came_vector_update_": 1.0,
}
SHAPES: list[tuple[int, ...]] = [(3, 4), (40, 130), (2, 700)]
FORMATS = ["float32", "bfloat16", "int8", "int4", "fp8"]

every_update = pytest.mark.parametrize("op", LEFT_OUT)


def _moments(format: str, *, signed: bool) -> list[Any]:
    found = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    found = found if signed else [x.square() for x in found]
    if format == "float32":
        return found
    return [functional.encode_state(x, format, signed=signed) for x in found]


def _lists(op: str, format: str = "float32") -> list[list[Any]]:
    """Weights, gradients, states and steps; the same ones in each call."""
    torch.manual_seed(0)
    lists: list[list[Any]] = [[torch.randn(s, device=DEVICE) for s in SHAPES] for _ in range(2)]
    lists.append(_moments(format, signed=True))
    if op == "came_update_":
        lengths = [(shape[0], torch.Size(shape[1:]).numel()) * 2 for shape in SHAPES]
        factors = [[torch.rand(n, device=DEVICE) + 0.1 for n in each] for each in lengths]
        lists.append([FactoredState(*x) for x in factors])
    elif op != "lars_update_":
        lists.append(_moments(format, signed=False))
    return [*lists, [torch.tensor(2.0 + k, device=DEVICE) for k in range(len(SHAPES))]]


def _parts(*lists: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in (x for column in lists for x in column):
        if isinstance(x, QuantizedState):
            found += [x.codes, x.scales]
        else:
            found += [x] if isinstance(x, Tensor) else list(x)
    return found


def _in_two(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    rounded, errors = zip(*map(split_weight, weights), strict=True)
    return list(rounded), list(errors)


@every_update
@pytest.mark.parametrize("format", FORMATS)
def test_no_bit_changes_where_infinities_were_found(op: str, format: str) -> None:
    weights, grads, *states, steps = _lists(op, format)
    rounded, errors = _in_two(weights)
    grads[0][0, 0], grads[1][0, 0] = torch.nan, torch.inf
    written = _parts(rounded, errors, *states)
    kept = [x.clone() for x in written]
    options: dict[str, Any] = {"lr": 0.1, "weight_errors": errors}
    options["found_inf"] = torch.tensor([1.0], device=DEVICE)
    found = getattr(kernels, op)(rounded, grads, *states, steps, fused=True, **options)
    assert all(torch.equal(x, y) for x, y in zip(written, kept, strict=True))
    assert found.tolist() == [LEFT_OUT[op]] * len(SHAPES)


@every_update
def test_a_step_that_is_left_out_takes_part_in_every_reduction(op: str) -> None:
    def reduce(sums: Tensor) -> Tensor:
        seen.append(sums.shape)
        return sums

    seen: list[torch.Size] = []
    counts = []
    for number in (0.0, 1.0):
        found_inf = torch.tensor(number, device=DEVICE)
        options: dict[str, Any] = {"lr": 0.1, "reduce": reduce, "found_inf": found_inf}
        found = getattr(kernels, op)(*_lists(op), fused=True, **options)
        counts.append(len(seen))
    assert counts[1] == 2 * counts[0] != 0
    assert found.tolist() == [LEFT_OUT[op]] * len(SHAPES)


@every_update
def test_weights_are_rounded_by_the_words_of_random_bits(op: str) -> None:
    def rounded(*, fused: bool) -> list[Tensor]:
        weights, *others = _lists(op)
        dtypes = (torch.bfloat16, torch.float32, torch.bfloat16)
        weights = [x.to(dtype) for x, dtype in zip(weights, dtypes, strict=True)]
        options: dict[str, Any] = {"rounding": "stochastic", "seed": 5, "stream": 8}
        getattr(kernels, op)(weights, *others, lr=1e-3, fused=fused, **options)
        return weights

    found, expected = rounded(fused=True), rounded(fused=False)
    torch.testing.assert_close(found[1], expected[1])
    for i in (0, 2):  # sums of float32 in another order decide a few of them
        assert (found[i] == expected[i]).float().mean() > 0.99


@every_update
def test_errors_take_no_launch_of_their_own(op: str) -> None:
    counts = []
    for split in (False, True):
        weights, *others = _lists(op)
        rounded, errors = _in_two(weights)
        options = {"weight_errors": errors} if split else {}
        with launches() as found:
            getattr(kernels, op)(rounded, *others, lr=0.1, fused=True, **options)
        counts.append(found)
    assert counts[0] == counts[1]


def test_gradients_are_not_copied_to_be_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = _lists("lamb_update_", "int4")
    clip = torch.tensor(0.5, device=DEVICE)
    monkeypatch.setattr(torch, "_foreach_mul", lambda *_: pytest.fail("copied"))
    kernels.lamb_update_(*lists, lr=0.1, clip=clip, fused=True)
    other = _lists("lamb_update_", "int4")
    other[1] = [x / 2 for x in other[1]]
    kernels.lamb_update_(*other, lr=0.1, fused=True)
    for x, y in zip(_parts(*lists[2:4]), _parts(*other[2:4]), strict=True):
        assert torch.equal(x, y)


@every_update
@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "clip"])
def test_options_of_several_entries_are_refused(op: str, name: str) -> None:
    with launches() as found, pytest.raises(ValueError, match=name):
        getattr(kernels, op)(*_lists(op), lr=0.1, fused=True, **{name: torch.ones(2)})
    assert found == []


@every_update
def test_errors_belong_to_weights_in_bfloat16(op: str) -> None:
    lists = _lists(op)
    errors = [torch.zeros(shape, dtype=torch.int8, device=DEVICE) for shape in SHAPES]
    with pytest.raises(TypeError, match="split_weight"):
        getattr(kernels, op)(*lists, lr=0.1, fused=True, weight_errors=errors)


@every_update
def test_an_update_with_options_traces_as_one_graph(op: str) -> None:
    def update(errors: list[Tensor], factors: dict[str, Tensor], *lists: Any) -> Tensor:
        return getattr(kernels, op)(*lists, lr=0.1, fused=False, weight_errors=errors, **factors)

    found = []
    for number in (0.0, 1.0):
        for run in (torch.compile(update, fullgraph=True, backend="aot_eager"), update):
            weights, *others = _lists(op)
            rounded, errors = _in_two(weights)
            factors = {"grad_scale": 8.0, "found_inf": number, "clip": 0.5}
            run(errors, {k: torch.tensor(x) for k, x in factors.items()}, rounded, *others)
            joined = map(functional.join_weight, rounded, errors)
            found.append(_parts(joined, *others[1:-1]))
    for x, y in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(x, y, rtol=2.0**-14, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(found[2], found[3], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
