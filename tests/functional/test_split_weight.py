"""Weights of 24 bits: what is lost, and that nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import join_weight, split_weight

LARGEST = 0x7F7F0000  # of bfloat16, as the bits of a float32


def _numbers(count: int = 200_000) -> Tensor:
    """Finite float32 of all exponents that bfloat16 reaches, those at its steps among them."""
    bits = torch.randint(LARGEST, (count,), dtype=torch.int32)
    near = torch.randint(0x0100, 0x7F7F, (count,), dtype=torch.int32) << 16
    near += torch.randint(-2, 3, (count,), dtype=torch.int32)
    half = (torch.randint(0x0100, 0x7F7E, (count,), dtype=torch.int32) << 16) + 0x8000
    half += torch.randint(-200, 200, (count,), dtype=torch.int32)
    x = torch.cat([bits, near, half]).view(torch.float32)
    return torch.cat([x, -x])


def test_no_more_is_lost_than_a_512th_of_a_place() -> None:
    x = _numbers().double()
    rounded, errors = split_weight(x.float())
    place = torch.ldexp(torch.ones_like(x), torch.frexp(rounded.double()).exponent - 8)
    place = place.clamp_min(2.0**-133)
    assert ((join_weight(rounded, errors).double() - x).abs() <= place / 512).all()


def test_the_upper_part_is_what_bfloat16_makes_of_it_but_next_to_ties() -> None:
    x = _numbers()
    rounded, errors = split_weight(x)
    assert ((rounded == x.bfloat16()) | (errors == -128)).all()
    x = torch.randn(100_000)
    assert (split_weight(x)[0] == x.bfloat16()).double().mean() > 1 - 1 / 256


def test_order_is_kept() -> None:
    x = _numbers().sort().values
    assert (join_weight(*split_weight(x)).diff() >= 0).all()
    assert (split_weight(x)[0].double().diff() >= 0).all()


def test_what_was_split_and_joined_is_split_and_joined_again_bit_for_bit() -> None:
    pair = split_weight(_numbers())
    again = split_weight(join_weight(*pair))
    assert all(torch.equal(x, y) for x, y in zip(again, pair, strict=True))


def test_every_pair_of_a_number_and_an_error_is_a_number_of_its_own() -> None:
    upper = torch.arange(0x3F00, 0x4180, dtype=torch.int16).view(torch.bfloat16)
    rounded = upper.repeat_interleave(256)
    errors = torch.arange(-128, 128, dtype=torch.int8).repeat(len(upper))
    joined = join_weight(rounded, errors)
    assert len(joined.unique()) == len(joined)
    assert torch.equal(split_weight(joined)[0], rounded)
    assert torch.equal(split_weight(joined)[1], errors)


def test_what_is_no_number_stays_so() -> None:
    payload = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([torch.inf, -torch.inf, 0.0, -0.0]), payload])
    rounded, errors = split_weight(x)
    assert torch.equal(rounded[:4].float(), x[:4])
    assert torch.signbit(rounded[:4]).tolist() == [False, True, False, True]
    assert join_weight(rounded, errors)[4:].isnan().all()
    assert rounded[4:].isnan().all()


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    rounded, errors = split_weight(torch.randn(shape).T if len(shape) == 2 else torch.randn(shape))
    assert rounded.shape == errors.shape == join_weight(rounded, errors).shape
    assert rounded.dtype == torch.bfloat16
    assert errors.dtype == torch.int8


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.float32 with errors in torch\.int8"):
        join_weight(torch.ones(2), torch.zeros(2, dtype=torch.int8))
