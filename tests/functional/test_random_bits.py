from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import random_bits

ONES = 2**64 - 1


@pytest.mark.parametrize(
    ("counter", "step", "stream", "seed", "words"),
    [
        (0, 0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ONES, ONES >> 32, ONES >> 32, ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (  # digits of π
            0x85A308D3_243F6A88,
            0x13198A2E,
            0x03707344,
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_published_words(
    counter: int, step: int, stream: int, seed: int, words: list[int]
) -> None:
    found = random_bits(4, seed=seed, step=step, stream=stream, offset=4 * counter)
    assert found.tolist() == words


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 65_535, 65_536, 2**34 - 2])
def test_an_offset_is_a_place_in_the_one_sequence(offset: int) -> None:
    start = offset - offset % 4
    whole = random_bits(16, seed=9, step=2, stream=1, offset=start)
    part = random_bits(5, seed=9, step=2, stream=1, offset=offset)
    assert torch.equal(part, whole[offset - start :][:5])


def test_tiles_do_not_show() -> None:
    whole = random_bits(70_000, seed=1)
    assert torch.equal(whole[65_530:65_550], random_bits(20, seed=1, offset=65_530))


def test_seed_step_and_stream_each_give_other_words() -> None:
    found = [
        random_bits(8, seed=seed, step=step, stream=stream)
        for seed, step, stream in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert torch.stack(found).unique().numel() == 5 * 8


def test_every_bit_is_set_half_of_the_time_and_none_follows_another() -> None:
    count = 40_000
    words = random_bits(count, seed=5)
    bits: Tensor = (words[:, None] >> torch.arange(32)) & 1
    signs = 2.0 * bits - 1
    bound = 4.5 * count**0.5  # 32 · 33 / 2 sums are looked at
    sums = signs.T @ signs
    assert signs.sum(0).abs().max() < bound
    assert (sums - count * torch.eye(32)).abs().max() < bound
    assert (signs[1:] * signs[:-1]).sum(0).abs().max() < bound


def test_no_words_are_no_words() -> None:
    assert random_bits(0, seed=0).shape == (0,)
    assert random_bits(0, seed=0, offset=3).dtype == torch.int64


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"step": 2**32},
        {"stream": -1},
        {"offset": -1},
        {"offset": 2**66},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        random_bits(4, **({"seed": 0} | wrong))


@pytest.mark.parametrize("step", [0, 1, 77, 2**24, 2**32 - 256])
def test_a_step_may_be_a_tensor_which_is_not_waited_for(step: int) -> None:
    expected = random_bits(70, seed=3, step=step, stream=2)
    assert torch.equal(random_bits(70, seed=3, step=torch.tensor(step), stream=2), expected)
    counted = torch.tensor(float(step), dtype=torch.float32)
    assert torch.equal(random_bits(70, seed=3, step=counted, stream=2), expected)
    assert random_bits(70, seed=3, step=counted.to("meta"), device="meta").shape == (70,)


def test_it_compiles_whole() -> None:
    compiled = torch.compile(random_bits, fullgraph=True, backend="eager")
    assert torch.equal(compiled(70, seed=3, step=1), random_bits(70, seed=3, step=1))
