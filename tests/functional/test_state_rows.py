from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import (
    QuantizedState,
    decode_state,
    encode_state,
    state_from_rows,
    state_to_rows,
)

KINDS = [("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8", True)]
SHAPES = [(4, 200), (3, 512), (9, 30), (6, 5, 7), (2, 1000), (1, 300), (0, 40)]
every_kind = pytest.mark.parametrize(("format", "signed"), KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def _made(shape: tuple[int, ...], format: str, signed: bool) -> QuantizedState:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return encode_state(x if signed else x.square(), format, signed=signed)


def _some(rows: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: x if name == "column_scales" else x[part] for name, x in rows.items()}


@every_kind
@every_shape
def test_all_rows_make_the_state_bit_for_bit(
    shape: tuple[int, ...], format: str, signed: bool
) -> None:
    state = _made(shape, format, signed)
    back = state_from_rows(state_to_rows(state), format, signed=signed)
    assert torch.equal(back.codes, state.codes)
    assert torch.equal(back.scales, state.scales)
    assert back[2:5] == state[2:5]


@every_kind
@every_shape
def test_one_row_of_everything_goes_with_a_row_of_the_tensor(
    shape: tuple[int, ...], format: str, signed: bool
) -> None:
    rows = state_to_rows(_made(shape, format, signed))
    assert rows["codes"].shape == shape
    assert {len(x) for name, x in rows.items() if name != "column_scales"} == {shape[0]}


@every_kind
@every_shape
def test_some_rows_are_what_they_were_up_to_the_error_of_the_format(
    shape: tuple[int, ...], format: str, signed: bool
) -> None:
    state = _made(shape, format, signed)
    rows, whole = state_to_rows(state), decode_state(state)
    worst = {"int8": 0.45 / 64, "int4": 0.1125, "fp8": 1 / 16}[format] * (1 + 1e-5)
    for part in (slice(0, 1), slice(1, None), slice(2, 4)):
        read = decode_state(state_from_rows(_some(rows, part), format, signed=signed))
        truth = whole[part]
        assert read.shape == truth.shape
        if truth.numel():
            assert (read - truth).abs().max() <= worst * truth.abs().max()


@pytest.mark.parametrize(("format", "width"), [("int8", 256), ("int4", 128), ("fp8", 128)])
def test_rows_of_whole_blocks_stand_by_themselves_bit_for_bit(format: str, width: int) -> None:
    state = _made((6, 2 * width), format, True)
    rows = state_to_rows(state)
    assert "offsets" not in rows
    lower = state_from_rows(_some(rows, slice(2, 5)), format)
    assert torch.equal(decode_state(lower), decode_state(state)[2:5])


def test_second_moments_in_four_bits_stand_by_themselves_whatever_their_width() -> None:
    state = _made((6, 37), "int4", False)
    lower = state_from_rows(_some(state_to_rows(state), slice(2, 5)), "int4", signed=False)
    assert torch.equal(decode_state(lower), decode_state(state)[2:5])


def test_a_vector_in_four_bits_without_a_sign_is_refused() -> None:
    with pytest.raises(ValueError, match='take "float32"'):
        state_to_rows(_made((300,), "int4", False))
