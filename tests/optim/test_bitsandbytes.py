"""The steps of bitsandbytes on our states, next to ours and to those of its own optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext import functional, kernels
from lightning_ext.functional import QuantizedState, decode_state, encode_state, zero_state
from lightning_ext.optim._low_bit import _bitsandbytes as backend
from lightning_ext.optim._low_bit import _bitsandbytes_step as inside

bnb = pytest.importorskip("bitsandbytes")

Update = Callable[..., None]

SHAPE = (100, 700)
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
UPDATES = {
    "AdamW": (backend.adamw_update_, kernels.adamw_update_, 2),
    "Lion": (backend.lion_update_, kernels.lion_update_, 1),
}
OUTSIDE = {
    "AdamW": bnb.optim.AdamW8bit,
    "Lion": bnb.optim.Lion8bit,
    "float32": torch.optim.AdamW,
}


class Run(NamedTuple):
    start: Tensor
    weight: Tensor
    moments: list[QuantizedState]


def draws(steps: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight, *grads = torch.randn(1 + steps, *shape, generator=generator).unbind()
    return weight, grads


def run(updates: list[Update], moments: int, **how: Any) -> Run:
    """Take a step by each update; `shape` and `dtype` are of the weight, the rest are options."""
    shape, dtype = how.pop("shape", SHAPE), how.pop("dtype", torch.float32)
    weight, grads = draws(len(updates), shape)
    weight, step = weight.to(dtype), torch.tensor(0.0)
    kept = [zero_state(shape, "int8", signed=k == 0) for k in range(moments)]
    start = weight.clone()
    for update, grad in zip(updates, grads, strict=True):
        step += 1
        update(*([x] for x in (weight, grad.to(dtype), *kept, step)), **SETTINGS | how)
    return Run(start, weight, kept)


def outside(name: str, steps: int) -> Run:
    start, grads = draws(steps)
    weight = Parameter(start.clone())
    optimizer = OUTSIDE[name]([weight], **SETTINGS)
    for grad in grads:
        weight.grad = grad
        optimizer.step()
    return Run(start, weight.detach(), [])


def distance(one: Run, other: Run) -> float:
    """Between what two runs end with, as a share of the way."""
    way = (other.weight - other.start).norm()
    return ((one.weight - other.weight).norm() / way).item()


def same(one: Run, other: Run) -> bool:
    pairs = zip(one.moments, other.moments, strict=True)
    equal = [x.codes.equal(y.codes) and x.scales.equal(y.scales) for x, y in pairs]
    return one.weight.equal(other.weight) and all(equal)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_its_numbers_but_for_rounding(signed: bool) -> None:
    theirs = bnb.functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(inside._map(signed, torch.device("cpu")), theirs, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", UPDATES)
def test_a_step_is_ours_but_for_a_few_codes(name: str) -> None:
    theirs, ours, count = UPDATES[name]
    one, other = run([theirs], count), run([ours], count)
    assert distance(one, other) < 2.0**-23 / SETTINGS["lr"]  # a last place of weights about 1
    # Measured: 0.17 % of first moments, 3.2 % of second ones; its bins are 1/32768 of a scale wide.
    for x, y, bound in zip(one.moments, other.moments, (0.003, 0.05)[:count], strict=True):
        assert 0 < (x.codes != y.codes).float().mean() < bound
        torch.testing.assert_close(x.scales, y.scales, rtol=3e-7, atol=0)
        gap = (decode_state(x) - decode_state(y)).abs().max() / y.scales.max()
        assert gap < 0.0142  # the widest gap of the map


@pytest.mark.parametrize(("name", "bound"), [("AdamW", 0.005), ("Lion", 0.02)])
def test_twenty_steps_are_ours_but_for_rounding(name: str, bound: float) -> None:
    theirs, ours, count = UPDATES[name]
    # Measured: 0.0020 and 0.0084.
    assert 0 < distance(run([theirs] * 20, count), run([ours] * 20, count)) < bound


@pytest.mark.parametrize(("name", "bound"), [("AdamW", 2e-4), ("Lion", 1e-3)])
def test_twenty_steps_are_those_of_its_own_optimizer(name: str, bound: float) -> None:
    theirs, _, count = UPDATES[name]
    # Measured: 4.6e-5 and 0.
    assert distance(run([theirs] * 20, count), outside(name, 20)) < bound


def test_twenty_steps_are_near_those_of_float32() -> None:
    assert 0.001 < distance(run([backend.adamw_update_] * 20, 2), outside("float32", 20)) < 0.03


@pytest.mark.parametrize(("name", "bound"), [("AdamW", 0.005), ("Lion", 0.02)])
def test_a_change_in_mid_run_is_a_matter_of_rounding(name: str, bound: float) -> None:
    theirs, ours, count = UPDATES[name]
    there = run([ours] * 10 + [theirs] * 10, count)
    back = run([theirs] * 10 + [ours] * 10, count)
    whole = run([ours] * 20, count)
    assert 0 < distance(there, whole) < bound
    assert 0 < distance(back, whole) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", UPDATES)
def test_narrow_weights_take_the_same_steps(name: str, dtype: torch.dtype) -> None:
    theirs, ours, count = UPDATES[name]
    one, other = run([theirs], count, dtype=dtype), run([ours], count, dtype=dtype)
    assert (one.weight != other.weight).float().mean() < 1e-3
    assert one.weight.dtype == dtype


@pytest.mark.parametrize("name", UPDATES)
def test_parts_of_a_tensor_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update, _, count = UPDATES[name]
    parts = run([update] * 3, count, shape=(130, 1001))
    monkeypatch.setitem(inside._SPANS, "cpu", 1 << 30)
    assert same(parts, run([update] * 3, count, shape=(130, 1001)))


@pytest.mark.parametrize("count", [1.0, 2.5, 1000.25])
def test_a_count_may_be_a_fraction(count: float) -> None:
    weight, (grad, mean, square) = draws(3)
    first = encode_state(mean, "int8")
    second = encode_state(square.square(), "int8", signed=False)
    step = torch.tensor(count)
    settings = {**SETTINGS, "betas": (0.9, 0.99), "eps": 1e-3}
    there = [decode_state(x) for x in (first, second)]
    expected = functional.adamw_update(weight, grad, *there, step, **settings)[0]
    backend.adamw_update_([weight], [grad], [first], [second], [step], **settings)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UPDATES)
def test_a_weight_without_gradients_stays_here_and_moves_there(name: str) -> None:
    update, _, count = UPDATES[name]
    start, grads = draws(5)
    here, there = start.clone(), Parameter(start.clone())
    moments = [zero_state(SHAPE, "int8", signed=k == 0) for k in range(count)]
    optimizer = OUTSIDE[name]([there], lr=1e-2, weight_decay=0.0)
    for k, grad in enumerate(grads):
        grad[:, ::2] = 0
        counts = torch.tensor(1.0 + k)
        columns = [[x] for x in (here, grad, *moments, counts)]
        update(*columns, lr=1e-2, weight_decay=0.0)
        there.grad = grad
        optimizer.step()
    assert here[:, ::2].equal(start[:, ::2])
    moved = (there.detach() - start)[:, ::2]
    low, high = (-0.0401, -0.0399) if name == "Lion" else (-0.0004, -0.00005)
    assert low < moved.min() < moved.max() < high  # by Lion as far as in four steps of any other


@pytest.mark.parametrize("name", UPDATES)
def test_strides_do_not_matter(name: str) -> None:
    update, _, count = UPDATES[name]
    weight, (grad,) = draws(1, (64, 80))
    moments = [[zero_state((64, 80), "int8", signed=k == 0) for k in range(count)] for _ in "ab"]
    step = torch.tensor(1.0)
    turned = [x.t().contiguous().t() for x in (weight, grad)]
    for (w, g), kept in zip(((weight, grad), turned), moments, strict=True):
        update(*([x] for x in (w, g, *kept, step)), **SETTINGS)
    assert not turned[0].is_contiguous()
    assert turned[0].equal(weight)
    assert all(x.codes.equal(y.codes) for x, y in zip(*moments, strict=True))


@pytest.mark.parametrize("name", UPDATES)
def test_gradients_are_scaled_clipped_and_turned(name: str) -> None:
    update, _, count = UPDATES[name]
    options = {"grad_scale": torch.tensor(4.0), "clip": 2.0, "maximize": True}

    def by_hand(params: list[Tensor], grads: list[Tensor], *columns: Any, **settings: Any) -> None:
        update(params, [-0.5 * grads[0]], *columns, **settings)

    assert same(run([update] * 3, count, **options), run([by_hand] * 3, count))


@pytest.mark.parametrize("name", UPDATES)
def test_infinities_that_were_found_leave_every_bit(name: str) -> None:
    update, _, count = UPDATES[name]
    found = run([update], count, found_inf=torch.tensor(1.0))
    fresh = [zero_state(SHAPE, "int8", signed=k == 0) for k in range(count)]
    assert same(found, Run(found.start, found.start, fresh))


@pytest.mark.parametrize("name", UPDATES)
def test_tensors_with_moments_in_float32_take_our_update(name: str) -> None:
    theirs, ours, count = UPDATES[name]
    weight, (grad,) = draws(1)
    large = [zero_state(SHAPE, "int8", signed=k == 0) for k in range(count)]
    lone, small = ([weight[0].clone(), *torch.zeros(count, 700)] for _ in range(2))
    step = torch.tensor(1.0)
    rows = zip((weight, grad, *large, step), (small[0], grad[0], *small[1:], step), strict=True)
    theirs(*map(list, rows), **SETTINGS)
    ours(*([x] for x in (lone[0], grad[0], *lone[1:], step)), **SETTINGS)
    assert all(x.equal(y) for x, y in zip(lone, small, strict=True))


def test_autograd_sees_that_a_weight_has_changed() -> None:
    weight = Parameter(torch.randn(512))
    loss = weight.square().sum()
    state = zero_state((512,), "int8")
    backend.lion_update_([weight], [torch.ones(512)], [state], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_its_lamb_in_8_bits_applies_no_trust_ratio(scale: float) -> None:
    moved = {}
    for kind in (bnb.optim.LAMB8bit, bnb.optim.AdamW8bit):
        start, (grad,) = draws(1)
        weight = Parameter(scale * start)
        weight.grad = grad
        kind([weight], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0).step()
        moved[kind] = (weight.detach() - scale * start).norm().item()
    lamb, adamw = moved.values()
    # A step of ‖w‖·lr would be 100 times larger for the larger weights.
    assert lamb == pytest.approx(adamw, rel=1e-6)
    assert lamb == pytest.approx(1e-2 * math.sqrt(start.numel()), rel=1e-3)


def test_pages_are_fetched_before_a_step_and_waited_for_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", lambda x: seen.append(f"{x.is_paged}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(device.type))
    state: Any = zero_state(SHAPE, "int8")
    state.codes.is_paged, state.codes.page_deviceid = True, 0
    weight, (grad,) = draws(1)
    backend.lion_update_([weight], [grad], [state], lr=0.1)
    assert seen == ["True", "True", "cpu"]  # of two parts


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", UPDATES)
def test_on_cuda_it_is_the_step_of_the_cpu(name: str, paged: bool) -> None:
    update, _, count = UPDATES[name]
    weight, (grad,) = draws(1, (400, 700))
    found = []
    for device in ("cpu", "cuda"):
        moved = weight.to(device, copy=True)
        kept = [
            zero_state(weight.shape, "int8", signed=k == 0, device=device) for k in range(count)
        ]
        if paged and device == "cuda":
            kept = [backend.page_state(x) for x in kept]
        columns = [[x] for x in (moved, grad.to(device), *kept, torch.tensor(2.5))]
        update(*columns, lr=0.1, weight_decay=2.0)
        found.append((moved.cpu(), kept[0].codes.cpu()))
    (here, codes), (there, others) = found
    assert (there - here).norm() < 1e-5 * (here - weight).norm()
    assert (codes != others).float().mean() < 0.01
