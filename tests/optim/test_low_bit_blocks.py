"""Ends of blocks, and numbers that are not like others, in LowBitAdamW's moments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext.functional import QuantizedState, decode_state
from lightning_ext.optim import LowBitAdamW

LOW = ("bfloat16", "int8", "int4", "fp8")
BLOCKS = {"bfloat16": 1, "int8": 256, "int4": 128, "fp8": 128}
SHAPES = [(2, 3), (3, 129), (17, 33), (5, 3, 3, 3), (1, 300), (300, 1), (1, 1), (0, 3), (3, 0)]
in_few_bits = pytest.mark.parametrize("format", LOW)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(
    start: Tensor, grads: list[Tensor], format: str, **how: Any
) -> tuple[Tensor, dict[str, Any]]:
    weight = Parameter(start.clone(memory_format=torch.preserve_format))
    settings: dict[str, Any] = {"lr": 0.01, "min_quantized_numel": 0, "weight_decay": 0.0} | how
    optimizer = LowBitAdamW([weight], state_dtype=format, **settings)
    for grad in grads:
        weight.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@in_few_bits
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_may_end_anywhere(shape: tuple[int, ...], format: str) -> None:
    start, grads = noise(shape, 0), [noise(shape, i) for i in (1, 2)]
    found, state = trained(start, grads[:1], format)
    truth, _ = trained(start, grads[:1], "float32")
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)  # nothing is rounded yet
    assert isinstance(state["exp_avg"], QuantizedState) == (start.numel() > 0)
    found, state = trained(start, grads, format)
    truth, wanted = trained(start, grads, "float32")
    assert found.isfinite().all()
    if start.numel():
        apart = decode_state(state["exp_avg"]) - wanted["exp_avg"]
        assert apart.norm() <= 0.2 * wanted["exp_avg"].norm()
    assert (found - truth).norm() <= 0.4 * (truth - start).norm()


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 4, 8), (12, 1, 1)])
def test_second_moments_of_one_row_or_column_stay_in_float32_under_int4(
    shape: tuple[int, ...],
) -> None:
    _, state = trained(noise(shape, 0), [noise(shape, 1)], "int4")
    assert state["exp_avg"].format == "int4"
    assert state["exp_avg_sq"].dtype == torch.float32


@in_few_bits
def test_strides_make_no_difference(format: str) -> None:
    start, grads = noise((6, 10, 3, 3), 0), [noise((6, 10, 3, 3), i) for i in (1, 2, 3)]
    plain, _ = trained(start, grads, format)
    last = start.to(memory_format=torch.channels_last)
    found, _ = trained(last, grads, format)
    assert torch.equal(found, plain)
    mixed = [x.to(memory_format=torch.channels_last) for x in grads]
    found, _ = trained(start.transpose(0, 1).contiguous().transpose(0, 1), mixed, format)
    assert torch.equal(found, plain)


@in_few_bits
def test_equal_entries_are_kept_as_they_are(format: str) -> None:
    grad = torch.full((9, 40), 0.5)
    _, state = trained(torch.ones(9, 40), [grad], format, betas=(0.5, 0.75))
    for name, value in (("exp_avg", 0.25), ("exp_avg_sq", 0.0625)):
        assert torch.equal(decode_state(state[name]), torch.full((9, 40), value)), name


@in_few_bits
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_block(bad: float, format: str) -> None:
    """Its entry is lost at once, the rest of its block at the next step, and no other."""
    start, grads = noise((6, 512), 0), [noise((6, 512), i) for i in (1, 2, 3)]
    clean, _ = trained(start, grads, format)
    grads[0][2, 5] = bad
    first, _ = trained(start, grads[:1], format)
    lost = ~first.isfinite()
    assert lost.sum() == 1
    assert lost[2, 5]
    found, _ = trained(start, grads, format)
    block = torch.zeros(6, 512, dtype=torch.bool)
    block[2, : BLOCKS[format]] = format != "bfloat16"
    block[2, 5] = True
    assert (found.isfinite() | block).all()
    if format == "int4":  # the maximum of a column is another, where that of the row is as large
        block[:, 5] = True
        block[2] = True
    assert torch.equal(found[~block], clean[~block])


@in_few_bits
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e-22])
def test_zeros_and_tiny_gradients_make_no_nan(size: float, format: str) -> None:
    grad = torch.full((6, 200), size)
    found, state = trained(torch.ones(6, 200), [grad, grad, 0 * grad], format)
    assert torch.allclose(found, torch.ones(6, 200), atol=1e-6)
    assert all(decode_state(state[x]).isfinite().all() for x in ("exp_avg", "exp_avg_sq"))


@in_few_bits
def test_rows_of_zeros_beside_others_make_no_nan(format: str) -> None:
    grads = [noise((6, 200), i) for i in (1, 2, 3)]
    for grad in grads:
        grad[2:4] = 0
        grad[:, 7] = 0
    found, _ = trained(torch.ones(6, 200), grads, format)
    assert found.isfinite().all()
    assert (found[2:4] == 1).all()


@in_few_bits
def test_small_entries_of_a_block_move_no_further_than_others(format: str) -> None:
    """A second moment that its block rounds to 0 would divide by nothing at the next step."""
    grad = noise((6, 200), 1)
    grad[:, ::50] *= 1e-4
    found, _ = trained(torch.zeros(6, 200), [grad, 0 * grad], format)
    assert found.abs().max() < 0.05  # two steps of 0.01
