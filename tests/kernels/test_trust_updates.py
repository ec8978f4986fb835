from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import launches
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.functional import FactoredState, QuantizedState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = ["lamb_update_", "lars_update_", "adamp_update_", "came_update_", "came_vector_update_"]
COUNTED = ("lamb_update_", "adamp_update_")
SHAPES: list[tuple[int, ...]] = [(3, 4), (40, 130), (2, 700), (1, 1)]


def _lists(op: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[list[Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    weights, grads, means = ([normal(shape) for shape in shapes] for _ in range(3))
    lists: list[list[Any]] = [weights, grads, means]
    if op == "came_update_":
        lengths = [(shape[0], torch.Size(shape[1:]).numel()) * 2 for shape in shapes]
        lists.append([FactoredState(*(normal([n]).abs() for n in each)) for each in lengths])
    elif op != "lars_update_":
        lists.append([normal(shape).square() for shape in shapes])
    if op in COUNTED:
        lists.append([torch.tensor(2.0, device=DEVICE) for _ in shapes])
    return lists


@pytest.mark.parametrize("op", OPS)
def test_many_parameters_take_as_many_launches_as_one(op: str) -> None:
    counts = []
    for shapes in ([(3, 4)], SHAPES):
        with launches() as found:
            getattr(kernels, op)(*_lists(op, shapes), lr=0.1, fused=True)
        counts.append(found)
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 11


@pytest.mark.parametrize("op", OPS)
def test_a_parameter_moves_the_same_to_the_bit_in_any_company(op: str) -> None:
    together = _lists(op)
    getattr(kernels, op)(*together, lr=0.1, fused=True)
    for i in range(len(SHAPES)):
        alone = [column[i : i + 1] for column in _lists(op)]
        getattr(kernels, op)(*alone, lr=0.1, fused=True)
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[2][0], together[2][i])


@pytest.mark.parametrize("op", OPS)
def test_what_is_returned_is_what_torch_returns(op: str) -> None:
    found, expected = (
        getattr(kernels, op)(*_lists(op), lr=0.1, fused=fused) for fused in (True, False)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_versions_of_what_is_written_are_counted(op: str) -> None:
    lists = _lists(op)
    before = [x._version for x in lists[0] + lists[2]]
    getattr(kernels, op)(*lists, lr=0.1, fused=True)
    after = [x._version for x in lists[0] + lists[2]]
    assert all(x < y for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_double_precision_is_refused_by_the_kernel(op: str) -> None:
    lists = _lists(op)
    lists[0] = [x.double() for x in lists[0]]
    with pytest.raises(TypeError, match="float64"):
        getattr(kernels, op)(*lists, lr=0.1, fused=True)


@pytest.mark.parametrize("op", OPS)
def test_lists_that_do_not_fit_are_refused_before_any_launch(op: str) -> None:
    short, other = _lists(op), _lists(op)
    short[1].pop()
    other[1][0] = other[1][0][:2].contiguous()
    for lists, words in ((short, "give one for each"), (other, "must be equal")):
        with launches() as found, pytest.raises(ValueError, match=words):
            getattr(kernels, op)(*lists, lr=0.1, fused=True)
        assert found == []


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_a_rank_without_entries_takes_part_in_every_reduction(op: str, fused: bool) -> None:
    calls: list[list[torch.Size]] = []
    for shape in ((4, 3), (0, 3)):
        seen: list[torch.Size] = []
        settings: dict[str, Any] = {"lr": 0.1, "fused": fused}
        getattr(kernels, op)(
            *_lists(op, [shape]), reduce=lambda x, kept=seen: kept.append(x.shape) or x, **settings
        )
        calls.append(seen)
    assert calls[0] == calls[1] != []


def test_states_of_two_formats_are_refused_in_one_list() -> None:
    lists = _lists("lars_update_", [(3, 4), (3, 4)])
    lists[2] = [
        functional.encode_state(x, f) for x, f in zip(lists[2], ("int8", "fp8"), strict=True)
    ]
    with pytest.raises(ValueError, match="formats fp8, int8"):
        kernels.lars_update_(*lists, lr=0.1, fused=True)


def test_rounding_at_random_needs_counts_of_steps() -> None:
    lists = _lists("lars_update_", [(3, 4)])
    lists[2] = [functional.encode_state(x, "bfloat16") for x in lists[2]]
    with pytest.raises(ValueError, match="needs steps"):
        kernels.lars_update_(*lists, lr=0.1, fused=True)


@pytest.mark.parametrize(
    "settings", [{"betas": (0.9, 1.0)}, {"lr": torch.ones(2)}, {"clip": torch.ones(2)}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"lr": 0.1} | settings
    with pytest.raises(ValueError, match=next(iter(settings))):
        kernels.lamb_update_(*_lists("lamb_update_"), **given, fused=True)


def test_factors_of_less_than_32_bits_are_refused() -> None:
    lists = _lists("came_update_")
    lists[3] = [FactoredState(*(x.bfloat16() for x in state)) for state in lists[3]]
    with pytest.raises(TypeError, match="float32"):
        kernels.came_update_(*lists, lr=0.1, fused=True)


@pytest.mark.parametrize("op", OPS)
def test_an_update_traces_as_one_graph(op: str) -> None:
    compiled, plain = _lists(op), _lists(op)
    compiled, plain = ([[_to_cpu(x) for x in c] for c in lists] for lists in (compiled, plain))
    update = getattr(kernels, op)
    torch.compile(lambda *x: update(*x, lr=0.1), fullgraph=True, backend="aot_eager")(*compiled)
    update(*plain, lr=0.1)
    for x, y in zip(compiled[0] + compiled[2], plain[0] + plain[2], strict=True):
        torch.testing.assert_close(x, y)


def _to_cpu(x: Any) -> Any:
    return FactoredState(*(y.cpu() for y in x)) if isinstance(x, FactoredState) else x.cpu()


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "bfloat16"])
def test_the_direction_is_that_of_moments_before_they_are_rounded(format: str) -> None:
    """The two launches of LAMB agree: the step is along what the ratio was made of."""
    weight, grad, mean, square, step = (column[0] for column in _lists("lamb_update_", [(8, 300)]))
    states = [
        functional.encode_state(x, format, signed=signed)
        for x, signed in ((mean, True), (square, False))
    ]
    first, second = map(functional.decode_state, states)
    start = weight.clone()
    settings: dict[str, Any] = {"eps": 0.01, "weight_decay": 0.0, "bias_correction": False}
    kernels.lamb_update_(
        [weight], [grad], *([x] for x in states), [step], lr=1.0, fused=True, **settings
    )
    first, second = first.lerp(grad, 0.1), second * 0.999 + grad.square() * 0.001
    direction = first / (second.sqrt() + 0.01)
    expected = start - direction * start.norm() / direction.norm()
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["lamb_update_", "adamp_update_"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_does_not_know_how_coarsely_its_second_moment_is_kept(op: str, fused: bool) -> None:
    grad = torch.logspace(-6, 0, 600, device=DEVICE).view(300, 2).t().contiguous()
    first = functional.zero_state((2, 300), "int8", device=DEVICE)
    second = functional.zero_state((2, 300), "int8", signed=False, device=DEVICE)
    weight, step = torch.ones(2, 300, device=DEVICE), torch.ones((), device=DEVICE)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-12, "fused": fused}
    getattr(kernels, op)([weight], [grad], [first], [second], [step], **settings)
    assert functional.decode_state(second)[0, 0] > 1e3 * 1e-3 * grad[0, 0].square()
    torch.testing.assert_close(weight, torch.full_like(weight, 0.99), rtol=1e-4, atol=0.0)


def test_random_rounding_depends_on_seed_step_and_stream() -> None:
    def codes(**settings: Any) -> Tensor:
        (weight,), (grad,), (mean,) = _lists("lars_update_", [(8, 300)])
        state: QuantizedState = functional.encode_state(mean, "bfloat16")
        step = torch.tensor(settings.pop("step", 1.0), device=DEVICE)
        kernels.lars_update_([weight], [grad], [state], [step], lr=0.1, fused=True, **settings)
        return state.codes

    assert torch.equal(codes(), codes())
    for other in ({"seed": 1}, {"stream": 4}, {"step": 2.0}):
        assert not torch.equal(codes(), codes(**other))
