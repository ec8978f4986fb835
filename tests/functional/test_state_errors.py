"""How far what is read of a state may be from what was written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import (
    decode_state,
    encode_state,
)


def _moment(shape: tuple[int, ...], signed: bool) -> Tensor:
    x = torch.randn(shape)
    return x if signed else x.square()


def _read(x: Tensor, format: str, signed: bool = True) -> Tensor:
    return decode_state(encode_state(x, format, signed=signed))


@pytest.mark.parametrize(
    ("format", "signed", "block", "half_step"),
    [("int8", True, 256, 0.45 / 64), ("int8", False, 256, 0.45 / 128), ("int4", True, 128, 0.1125)],
)
def test_of_its_block_an_entry_is_wrong_by_half_a_step_at_most(
    format: str, signed: bool, block: int, half_step: float
) -> None:
    x = _moment((9, block), signed) * torch.logspace(-20, 20, 9)[:, None]
    error = (_read(x.view(-1), format, signed).view_as(x) - x).abs()
    assert (error.amax(1) <= half_step * (1 + 1e-6) * x.abs().amax(1)).all()


def test_second_moments_in_four_bits_are_wrong_by_a_sixteenth_of_their_scale_at_most() -> None:
    v = _moment((40, 50), False)
    scale = torch.minimum(v.amax(1, keepdim=True), v.amax(0))
    read = _read(v, "int4", False)
    assert (read > 0).all()
    assert ((read - v).abs() <= scale / torch.where(v < scale / 32, 16, 32) * (1 + 1e-6)).all()


def test_a_second_moment_in_four_bits_is_never_0_beside_others() -> None:
    v = torch.zeros(30, 40)
    v[::7, ::3] = torch.rand(5, 14)
    v[1:6, 1] = 1e-20
    read = _read(v, "int4", False)
    in_both = (v.amax(1, keepdim=True) > 0) & (v.amax(0) > 0)
    assert (read[in_both] > 0).all()
    assert (read[~in_both] == 0).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_row_or_a_column_of_large_numbers_spoils_no_others(dim: int) -> None:
    v = torch.rand(64, 96).add_(0.5)
    v.select(dim, 5).mul_(1e4)
    wrong = (_read(v, "int4", False) / v - 1).abs()
    others = torch.arange(v.shape[dim]) != 5
    assert wrong.index_select(dim, others.nonzero()[:, 0]).max() < 0.1
    in_blocks = _read(v, "int4", True)  # what scales of rank 1 replace
    assert (in_blocks == 0).double().mean() > (0.5 if dim else 0.01)


def test_without_a_matrix_rows_are_of_128_entries() -> None:
    v = _moment((300,), False)
    folded = torch.nn.functional.pad(v, (0, 84)).view(3, 128)
    assert torch.equal(_read(v, "int4", False), _read(folded, "int4", False).view(-1)[:300])
    assert encode_state(v, "int4", signed=False).scales.shape == (3 + 128,)


def test_the_expansion_is_that_of_the_paper() -> None:
    x = torch.randn(7, 128, dtype=torch.float64) * torch.logspace(-9, 5, 7)[:, None]
    size = x.abs()
    most, least = size.amax(1, keepdim=True), size.amin(1, keepdim=True)
    centre = (most * least).sqrt()
    power = (8 * math.log2(448**2 / 2) / (most / least).log2()).floor() / 8
    scale = (most / centre) ** power / 448
    expected = (x.sign() * (size / centre) ** power / scale).to(torch.float8_e4m3fn)
    state = encode_state(x, "fp8")
    assert torch.equal(state.codes, expected.view(torch.uint8))
    assert torch.equal(state.scales[:, 1:], power)


@pytest.mark.parametrize("octaves", [0.0, 0.5, 3.0, 8.0, 16.0, 17.0, 40.0, 120.0])
def test_the_expansion_takes_a_group_to_the_range_of_e4m3(octaves: float) -> None:
    x = torch.logspace(-octaves / 2, octaves / 2, 128, base=2)
    state = encode_state(x, "fp8")
    power = state.scales[0, 1].item()
    assert state.codes[-1] == 0x7E  # 448
    assert state.codes[0] > 0
    assert power * octaves <= math.log2(448**2 / 2)
    assert power == 16 or (power + 1 / 8) * octaves > math.log2(448**2 / 2)
    octave_of_code = 1 / power if octaves else 0
    assert ((decode_state(state) / x).log2().abs() <= max(0.33 * octave_of_code, 1e-5)).all()


def test_of_a_narrow_group_expansion_leaves_less_error() -> None:
    x = torch.rand(128) + 0.5
    plain = (x * (448 / x.max())).to(torch.float8_e4m3fn).float() * (x.max() / 448)
    assert (_read(x, "fp8") - x).norm() < (plain - x).norm() / 5


def test_zeros_do_not_widen_a_group() -> None:
    x = torch.rand(128) + 0.5
    sparse = x.clone().index_fill(0, torch.arange(20), 0)
    sparse[20], x[:20] = 0.5, 0.5
    x[20] = 0.5
    assert torch.equal(_read(sparse, "fp8")[20:], _read(x, "fp8")[20:])
    assert (_read(sparse, "fp8")[:20] == 0).all()
