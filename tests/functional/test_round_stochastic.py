from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import round_stochastic

INF = math.inf


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    down = (x.view(torch.int32) & -0x10000).view(torch.float32)  # towards 0
    up = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    return torch.minimum(down, up), torch.maximum(down, up)


def test_the_mean_is_what_was_rounded() -> None:
    x = torch.randn(200)
    rounds = 1000
    found = torch.stack([round_stochastic(x, seed=7, step=i).double() for i in range(rounds)])
    low, high = _neighbours(x)
    share = (x.double() - low) / (high.double() - low)
    error = (high - low).double() * (share * (1 - share) / rounds).sqrt()
    apart = (found.mean(0) - x).abs()
    assert (apart <= 5 * error).all()  # 200 of them are looked at
    assert (found.mean(0) - x).sum().abs() <= 4 * error.square().sum().sqrt()


def test_only_neighbours_come_out() -> None:
    x = torch.randn(5000) * torch.logspace(-44, 38, 5000)
    low, high = _neighbours(x)
    out = round_stochastic(x, seed=0).float()
    assert ((out == low) | (out == high)).all()


def test_a_sum_that_rounding_to_nearest_would_leave_grows() -> None:
    total = torch.full((4000,), 256.0, dtype=torch.bfloat16)
    for step in range(64):
        total = round_stochastic(total.float() + 0.25, seed=1, step=step)
    error = (2 * 64 / 8 * 7 / 8 / 4000) ** 0.5 * 2  # of the mean: each addition moves 2 or nothing
    assert abs(total.float().mean() - (256 + 16)) < 4 * error
    assert torch.tensor(256.25).bfloat16() == 256


def test_what_bfloat16_has_is_kept() -> None:
    x = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastic(x.float(), seed=3), x)
    assert torch.equal(round_stochastic(x, seed=3), x)


def test_specials_are_kept() -> None:
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([INF, -INF, 0.0, -0.0]), nan])
    for step in range(20):
        out = round_stochastic(x, seed=0, step=step)
        assert out[:4].tolist() == [INF, -INF, 0, 0]
        assert out[:4].signbit().tolist() == [False, True, False, True]
        assert out[4:].isnan().all()


def test_a_finite_number_stays_finite() -> None:
    x = torch.tensor([torch.finfo(torch.float32).max]).repeat(1000)
    assert (round_stochastic(-x, seed=0) == torch.finfo(torch.bfloat16).min).all()


def test_the_same_counter_rounds_alike_and_another_stream_does_not() -> None:
    x = torch.randn(1000)
    one, other = (round_stochastic(x, seed=2, step=5, stream=s) for s in (0, 1))
    assert torch.equal(one, round_stochastic(x, seed=2, step=5))
    assert not torch.equal(one, other)


def test_memory_order_does_not_matter() -> None:
    x = torch.randn(17, 33)
    turned = x.T.contiguous().T
    assert torch.equal(round_stochastic(turned, seed=0), round_stochastic(x, seed=0))


def test_nothing_and_one_number() -> None:
    assert round_stochastic(torch.empty(0, 3), seed=0).shape == (0, 3)
    assert round_stochastic(torch.tensor(2.0), seed=0) == 2


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16"):
        round_stochastic(torch.ones(3), torch.float16, seed=0)


def test_it_compiles_whole() -> None:
    x = torch.randn(65)
    compiled = torch.compile(round_stochastic, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, seed=1), round_stochastic(x, seed=1))


def test_complex_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="give real numbers"):
        round_stochastic(torch.ones(3, dtype=torch.complex64), seed=0)
