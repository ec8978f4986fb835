"""Numbers rounded to codes of 8 bits, at random and to the nearest, and their bytes."""

from __future__ import annotations

import pytest
import torch
from harness.int8_parts import int8_layer, int8_weight, parts_of, same_codes
from torch import nn

from lightning_ext.nn import Int8Linear, Int8Weight


@pytest.mark.parametrize(("rows", "length"), [(8, 1024), (5, 300), (3, 1)])
def test_bytes_in_memory(rows: int, length: int) -> None:
    weight = int8_weight(rows, length)
    stored = sum(x.untyped_storage().nbytes() for x in parts_of(weight))
    assert weight.nbytes == stored == rows * (length + 8 * -(-length // 256))


def test_rounding_at_random_is_unbiased_within_four_standard_errors() -> None:
    value, times = torch.randn(4, 512), 400
    weight = nn.Parameter(Int8Weight.of(value))
    draws = [weight.requantize_(value, seed=7, step=i).codes.double() for i in range(times)]
    blocks = value.double().view(4, 2, 256)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    units = ((blocks - low) / (high - low) * 255).view(4, 512)
    variances = (units % 1) * (1 - units % 1) / times  # of the mean of a draw between two codes
    errors = torch.stack(draws).mean(0) - units
    assert errors.sum().abs() <= 4 * variances.sum().sqrt()
    assert ((errors.abs() <= 4 * variances.sqrt() + 1e-3).double().mean()) > 0.999


def test_a_step_below_half_a_quantum_moves_the_weight_on_average() -> None:
    start, quantum = torch.linspace(-1, 1, 256).repeat(4, 1), 2 / 255
    update = torch.full_like(start, quantum / 50)
    update[:, [0, -1]] = 0  # the ends, which scale and shift come from
    weight, nearest = (nn.Parameter(Int8Weight.of(start)) for _ in range(2))
    for step in range(100):
        weight.requantize_(weight.dequantize() + update, seed=1, step=step)
        with torch.no_grad():
            nearest.copy_(nearest.dequantize() + update)
    moved = (weight.dequantize() - start)[:, 20:-20].mean().item()
    assert moved == pytest.approx(2 * quantum, rel=0.05)
    assert (nearest.dequantize() - start).abs().max().item() < 1e-5


@pytest.mark.parametrize("spread", [0, 1])
def test_numbers_of_codes_give_the_codes_back(spread: int) -> None:
    of_blocks = (spread * torch.rand(1024, 1)).exp2()
    for value in (torch.randn(1024, 300), torch.randn(1024, 3), torch.zeros(1024, 3)):
        weight = Int8Weight.of(value)
        weight.requantize_(of_blocks * value, seed=0, step=0)
        again = Int8Weight.of(weight.dequantize())
        assert torch.equal(again.dequantize(), weight.dequantize())
        with torch.no_grad():
            other = Int8Weight.of(torch.randn(value.shape)).copy_(weight.dequantize())
        assert torch.equal(other.dequantize(), weight.dequantize())


def test_the_bits_are_of_seed_step_and_stream() -> None:
    value, seen = torch.randn(6, 300), []
    for bits in [{}, {"seed": 1}, {"step": 1}, {"stream": 1}]:
        one, other = int8_weight(), int8_weight()
        one.requantize_(value, **{"seed": 0, "step": 0, **bits})
        other.requantize_(value, **{"seed": 0, "step": 0, **bits})
        assert same_codes(one, other)
        seen.append(one.codes)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_new_numbers_go_into_the_same_memory() -> None:
    weight = int8_weight()
    places = [x.data_ptr() for x in parts_of(weight)]
    alias, version = weight.detach(), weight._version
    assert weight.requantize_(torch.randn(6, 300), seed=0, step=1) is weight
    assert [x.data_ptr() for x in parts_of(weight)] == places
    assert same_codes(alias, weight)
    assert weight._version == version + 1


def test_new_draws_are_those_of_a_linear_layer() -> None:
    layer = int8_layer()
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    plain = nn.Linear(300, 6)
    assert same_codes(layer.weight, Int8Weight.of(plain.weight.detach()))
    assert torch.equal(layer.bias, plain.bias)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="is a matrix"):
        Int8Weight.of(torch.zeros(3))
    with pytest.raises(ValueError, match=r"has shape \(300, 6\); the weight has \(6, 300\)"):
        int8_weight().requantize_(torch.zeros(300, 6), seed=0, step=0)
    with pytest.raises(ValueError, match="block_size"):
        Int8Linear(300, 6, block_size=100)
