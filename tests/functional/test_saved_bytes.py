"""Saved bytes of layers, worked by hand, and what a model fitted to them predicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ext.functional import saved_bytes
from lightning_ext.scaling import MemoryModel

N, L, D, F = 3, 7, 8, 32


def mlp(width: int = D, hidden: int = F) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """Attention that keeps its scores, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.out(attention(q, k, v))
        return (x + self.mlp(self.norms[1](x))).square().mean()


def test_a_linear_layer_saves_its_input() -> None:
    assert saved_bytes(nn.Linear(D, F), torch.randn(N, D)) == 4 * N * D


def test_an_mlp_saves_its_input_and_once_what_relu_and_the_second_layer_share() -> None:
    assert saved_bytes(mlp(), torch.randn(N, D)) == 4 * N * (D + F)


def test_attention_saves_queries_keys_values_and_weights() -> None:
    q, k, v = (torch.randn(N, L, D, requires_grad=True) for _ in range(3))
    weights = N * L * L
    assert saved_bytes(attention, q, k, v) == 4 * (3 * N * L * D + weights)


def test_attention_in_blocks_saves_no_weights() -> None:
    q, k, v = (torch.randn(N, 1, L, D, requires_grad=True) for _ in range(3))
    attend = nn.functional.scaled_dot_product_attention
    output_and_logsumexp = N * L * D + N * L
    assert saved_bytes(attend, q, k, v) == 4 * (3 * N * L * D + output_and_logsumexp)


def test_a_dtype_counts_its_size() -> None:
    assert saved_bytes(mlp().double(), torch.randn(N, D).double()) == 8 * N * (D + F)


def test_a_frozen_parameter_is_left_out_too() -> None:
    layer = nn.Linear(D, F).requires_grad_(False)
    assert saved_bytes(layer, torch.randn(N, D, requires_grad=True)) == 0


def test_a_slice_holds_all_of_its_storage() -> None:
    whole = torch.randn(10 * N, D)
    assert saved_bytes(nn.Linear(D, F), whole[:N]) == 4 * 10 * N * D


def test_without_gradients_nothing_is_saved() -> None:
    with torch.no_grad():
        assert saved_bytes(mlp(), torch.randn(N, D)) == 0


def test_checkpointing_saves_the_input_alone() -> None:
    x = torch.randn(N, D)
    module = mlp()
    assert saved_bytes(checkpoint, module, x, use_reentrant=False) == 4 * N * D


def test_keyword_arguments_are_passed_on() -> None:
    x = torch.randn(N, D, requires_grad=True)
    assert saved_bytes(torch.mul, input=x, other=x) == 4 * N * D


@pytest.mark.parametrize("make", [mlp, Block])
def test_the_meta_device_counts_the_same(make: Callable[[], Any]) -> None:
    x = torch.randn(N, L, D)
    assert saved_bytes(make().to("meta"), x.to("meta")) == saved_bytes(make(), x)


def test_an_mlp_is_linear_in_samples() -> None:
    module = mlp()
    found = [saved_bytes(module, torch.randn(n, D)) for n in range(1, 9)]
    assert found == [n * found[0] for n in range(1, 9)]


def test_gradients_are_those_without_measuring() -> None:
    module, x = mlp(), torch.randn(N, D)
    module(x).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    saved_bytes(lambda: module(x).sum().backward())
    assert all(torch.equal(p.grad, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("make", "lengths", "quadratic"), [(mlp, (5, 20), False), (Block, (5, 20, 40), True)]
)
def test_a_model_fitted_to_small_batches_predicts_a_large_one(
    make: Callable[[], Any], lengths: tuple[int, ...], quadratic: bool
) -> None:
    module = make()
    sizes = [(n, length) for n in (1, 2, 4) for length in lengths]
    rows = [(n, length, saved_bytes(module, torch.randn(n, length, D))) for n, length in sizes]
    model = MemoryModel.fit(rows, quadratic=quadratic)
    for length in (5, 12, 40, 100):
        measured = saved_bytes(module, torch.randn(64, length, D))
        assert model.bytes(64, length) == pytest.approx(measured, rel=0.01)


def test_the_fit_finds_what_was_worked_out_by_hand() -> None:
    q = torch.randn(8, 12, D, requires_grad=True)
    sizes = [(n, length) for n in (1, 2, 4) for length in (3, 6, 12)]
    rows = [
        (n, length, saved_bytes(attention, *(q[:n, :length].clone() for _ in range(3))))
        for n, length in sizes
    ]
    found = MemoryModel.fit(rows)
    assert found.token_bytes == pytest.approx(4 * 3 * D)
    assert found.token_pair_bytes == pytest.approx(4)
    assert found.sample_bytes == pytest.approx(0, abs=1e-6)
    assert found.fixed_bytes == pytest.approx(0, abs=1e-6)
