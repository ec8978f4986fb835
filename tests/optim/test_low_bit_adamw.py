"""LowBitAdamW beside torch's AdamW, and LAMB in few bits beside LAMB."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.low_bit_cases import Steps, same
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from lightning_ext.functional import QuantizedState, decode_state
from lightning_ext.optim import LAMB, LowBitAdamW

# Distance to float64 after 50 steps over the way; measured: 1.4e-6, 0.0042, 0.055, 0.050, 0.53.
APART = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.1, "fp8": 0.1, "int4": 0.8}


def way(make: Callable[[list[Parameter]], Optimizer], dtype: torch.dtype) -> tuple[Tensor, float]:
    """How far 50 steps move the weights of a small regression, and its loss then."""
    draw = torch.Generator().manual_seed(0)
    x, target = (torch.randn(n, 64, generator=draw, dtype=torch.float64) for n in (512, 64))
    shapes = ((64, 128), (128, 64))
    found = [torch.randn(s, generator=draw, dtype=torch.float64) * s[0] ** -0.5 for s in shapes]
    weights = [Parameter(w.to(dtype, copy=True)) for w in found]
    y, x = torch.tanh(x @ target / 8).to(dtype), x.to(dtype)
    optimizer = make(weights)
    for _ in range(50):
        optimizer.zero_grad()
        loss = (torch.tanh(x @ weights[0]) @ weights[1] - y).square().mean()
        loss.backward()
        optimizer.step()
    pairs = zip(weights, found, strict=True)
    return torch.cat([(w.detach().double() - s).flatten() for w, s in pairs]), loss.item()


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, float]:
    return way(lambda w: AdamW(w, lr=3e-3), torch.float64)


@pytest.mark.parametrize("format", APART)
def test_fifty_steps_end_near_adamw_in_float64(format: str, truth: tuple[Tensor, float]) -> None:
    moved, loss = way(lambda w: LowBitAdamW(w, lr=3e-3, state_dtype=format), torch.float32)
    apart = (moved - truth[0]).norm() / truth[0].norm()
    assert apart < APART[format]
    assert loss < 2.5 * truth[1]
    assert format in ("float32", "int4") or loss < 1.05 * truth[1]


def _pair() -> tuple[list[Parameter], list[Parameter]]:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(80, 60, generator=draw), torch.randn(60, generator=draw)]
    return [Parameter(x.clone()) for x in values], [Parameter(x.clone()) for x in values]


def _step(params: list[Parameter], *optimizers: Optimizer, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw)
    for optimizer in optimizers:
        optimizer.step()


def test_a_checkpoint_of_torch_is_converted_and_goes_back() -> None:
    theirs, ours = _pair()
    first, second = AdamW(theirs, lr=0.01), LowBitAdamW(ours, lr=0.5)
    _step(theirs, first)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.01
    assert second.param_groups[0]["state_dtype"] == "int8"
    for p, q in zip(theirs, ours, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            old, new = first.state[p][name], second.state[q][name]
            assert isinstance(new, QuantizedState) == (p.dim() > 1)
            read = decode_state(new) if isinstance(new, QuantizedState) else new
            assert (read - old).abs().max() <= 0.45 / 64 * (1 + 1e-5) * old.abs().max()
    wide = LowBitAdamW(_pair()[1], state_dtype="float32")
    wide.load_state_dict(second.state_dict())
    back = AdamW(_pair()[0])
    back.load_state_dict(wide.state_dict())
    for p, q in zip(ours, back.param_groups[0]["params"], strict=True):
        state = second.state[p]["exp_avg"]
        read = decode_state(state) if isinstance(state, QuantizedState) else state
        assert torch.equal(back.state[q]["exp_avg"], read)
    _step(back.param_groups[0]["params"], back)


def test_float32_goes_on_as_torch_does() -> None:
    theirs, ours = _pair()
    first, second = AdamW(theirs, lr=0.01), LowBitAdamW(ours, lr=0.01, state_dtype="float32")
    _step(theirs, first)
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            q.copy_(p)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # counts would be shared
    for seed in (2, 3):
        _step(theirs, first, seed=seed)
        _step(ours, second, seed=seed)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


def test_groups_have_formats_of_their_own() -> None:
    params = [Parameter(torch.ones(80, 60)) for _ in range(4)]
    formats = ("int8", "int4", "fp8", None)
    groups = [{"params": [p], "state_dtype": x} for p, x in zip(params, formats, strict=True)]
    optimizer = LowBitAdamW(groups)
    _step(params, optimizer)
    for p, format in zip(params, formats, strict=True):
        found = optimizer.state[p]["exp_avg"]
        assert found.format == format if format else isinstance(found, Tensor)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = LowBitAdamW([{**group, "params": [Parameter(torch.ones(80, 60))]} for group in groups])
    again.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(params, (g["params"][0] for g in again.param_groups), strict=True):
        a, b = optimizer.state[p]["exp_avg_sq"], again.state[q]["exp_avg_sq"]
        read = [decode_state(x) if isinstance(x, QuantizedState) else x for x in (a, b)]
        assert torch.equal(*read)


def test_least_entries_of_a_tensor_in_few_bits_are_set_by_group() -> None:
    params = [Parameter(torch.ones(8, 60)), Parameter(torch.ones(8, 60))]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:]}]
    groups[1]["min_quantized_numel"] = 479
    optimizer = LowBitAdamW(groups)
    _step(params, optimizer)
    kinds = [isinstance(optimizer.state[p]["exp_avg"], QuantizedState) for p in params]
    assert kinds == [False, True]


def test_steps_that_a_gradient_scaler_leaves_out_change_nothing() -> None:
    params, _ = _pair()
    optimizer, scaler = LowBitAdamW(params, lr=0.01), GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    _step(params)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in params]
    state = optimizer.state[params[0]]["exp_avg"]
    codes, scales = state.codes.clone(), state.scales.clone()
    _step(params)
    params[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, params, before))
    assert torch.equal(state.codes, codes)
    assert torch.equal(state.scales, scales)
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("wrong", [{"min_quantized_numel": -1}, {"seed": -1}, {"seed": 2**64}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LowBitAdamW([Parameter(torch.ones(2))], **wrong)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_lamb_keeps_its_trust_ratio(format: str) -> None:
    """Of weights 100 times as large the step is 100 times as long, as in float32."""
    for size in (1.0, 100.0):
        lengths = []
        for chosen in ("float32", format):
            weight = Parameter(torch.ones(80, 60) * size)
            how: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "state_dtype": chosen}
            optimizer = LAMB([{"params": [weight], "trust_ratio": True}], **how)
            for seed in range(3):
                before = weight.detach().clone()
                _step([weight], optimizer, seed=seed)
                lengths.append((weight.detach() - before).norm() / before.norm())
        torch.testing.assert_close(lengths, [torch.tensor(0.01)] * 6, rtol=1e-3, atol=0)


def test_another_seed_rounds_moments_otherwise() -> None:
    a, b, c = (Steps("LowBitAdamW", state_dtype="bfloat16", seed=x).run(3) for x in (0, 0, 5))
    assert same(a, b)
    assert not same(a, c)
