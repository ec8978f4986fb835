"""CAME: the paper's algorithm in numpy, another implementation, and what it keeps."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from harness._optimizer_case import Net, batch, groups_of
from harness._trajectories import Groups, largest_difference
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_ext.optim import CAME

Array = NDArray[np.float64]
BETAS, EPS = (0.9, 0.99, 0.995), (1e-30, 1e-16)
FACTORS = ("sq_row", "sq_col", "res_row", "res_col")
rates = (0.02, 0.01)


class InNumpy:
    """Algorithm 2 of the paper, entry by entry, and the form for vectors of the authors' code."""

    def __init__(self, groups: Groups, decay: float, clip: float) -> None:
        self.groups, self.decay, self.clip = groups, decay, clip
        self.kept: dict[Tensor, list[Array]] = {}

    def zero_grad(self) -> None:
        for group in self.groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        for group in self.groups:
            for p in group["params"]:
                p.data = torch.from_numpy(self.moved(p, group["lr"])).view_as(p)

    def moved(self, p: Tensor, lr: float) -> Array:
        w, g = (x.detach().numpy().reshape(len(p), -1) for x in (p, p.grad))
        n, k = w.shape
        old = self.kept.setdefault(p, [np.zeros((n, k))] * 2 + [np.zeros(n), np.zeros(k)] * 2)
        m, v, r, c, r2, c2 = old
        squares = g**2 + EPS[0]
        v = BETAS[1] * v + (1 - BETAS[1]) * squares
        r, c = (BETAS[1] * x + (1 - BETAS[1]) * squares.sum(i) for x, i in ((r, 1), (c, 0)))
        is_matrix = p.dim() > 1
        u = g / np.sqrt(np.outer(r, c) / r.sum() if is_matrix else v)
        u = u / max(1.0, math.sqrt((u**2).mean()) / self.clip)
        m = BETAS[0] * m + (1 - BETAS[0]) * u
        squares = (u - m) ** 2 + EPS[1]
        r2, c2 = (BETAS[2] * x + (1 - BETAS[2]) * squares.sum(i) for x, i in ((r2, 1), (c2, 0)))
        step = m / np.sqrt(np.outer(r2, c2) / r2.sum()) if is_matrix else m
        self.kept[p] = [m, v, r, c, r2, c2]
        return w - lr * self.decay * w - lr * step


def ours(decay: float = 0.1, clip: float = 1.0) -> Any:
    how = {"betas": BETAS, "eps": EPS, "weight_decay": decay, "clip_threshold": clip}
    return lambda _, groups: CAME(groups, **how)


@pytest.mark.parametrize("clip", [1.0, 0.1])
@pytest.mark.parametrize("problem", ["mlp", "conv net", "quadratic"])
def test_fifty_steps_are_those_of_the_paper(problem: str, clip: float) -> None:
    def reference(_: nn.Module, groups: Groups) -> Any:
        return InNumpy(groups, 0.1, clip)

    assert largest_difference(ours(clip=clip), reference, problem, rates) <= 1e-10


def other(_: nn.Module, groups: Groups) -> Any:
    return pytorch_optimizer.CAME(groups, betas=BETAS, weight_decay=0.1)


@pytest.mark.parametrize("problem", ["mlp", "quadratic"])
def test_of_matrices_it_is_that_of_pytorch_optimizer(problem: str) -> None:
    assert largest_difference(ours(), other, problem, rates) <= 1e-10


def test_of_convolutions_the_other_factors_the_last_two_dimensions() -> None:
    assert largest_difference(ours(), other, "conv net", rates) > 1e-3


def stepped(w: Tensor, *grads: Tensor, **how: Any) -> CAME:
    param = Parameter(w)
    optimizer = CAME([param], **how)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 3, 3)])
def test_a_matrix_keeps_its_momentum_and_two_numbers_a_row_and_column(
    shape: tuple[int, ...],
) -> None:
    optimizer = stepped(torch.ones(shape), torch.ones(shape))
    (state,) = optimizer.state.values()
    kept = sum(x.numel() for name, x in state.items() if name != "step")
    rows, columns = shape[0], math.prod(shape[1:])
    assert kept == rows * columns + 2 * (rows + columns)


def test_a_row_whose_gradients_disagree_moves_by_less_of_its_momentum() -> None:
    torch.manual_seed(0)
    w = Parameter(torch.zeros(2, 64, dtype=torch.float64))
    optimizer = CAME([w], lr=1.0)
    for _ in range(50):
        before = w.detach().clone()
        w.grad = torch.randn(2, 64, dtype=torch.float64) * torch.tensor([[0.01], [3.0]]) + 1
        optimizer.step()
    share = (before - w.detach()) / optimizer.state[w]["exp_avg"]
    assert share[1].mean() < 0.5 * share[0].mean()


def test_a_vector_steps_by_its_momentum() -> None:
    before = torch.zeros(5)
    optimizer = stepped(before.clone(), torch.randn(5), torch.randn(5), lr=0.5, betas=BETAS)
    (param,) = optimizer.param_groups[0]["params"]
    state = optimizer.state[param]
    assert set(state) == {"exp_avg", "exp_avg_sq", "step"}
    assert not torch.allclose(param, -0.5 * state["exp_avg"])  # of two steps
    last = param.detach().clone()
    param.grad = torch.randn(5)
    optimizer.step()
    torch.testing.assert_close(last - param.detach(), 0.5 * state["exp_avg"])


def test_the_first_steps_are_clipped() -> None:
    optimizer = stepped(torch.zeros(8, 8), torch.randn(8, 8) * 1e3, lr=0.1, clip_threshold=0.5)
    (kept,) = optimizer.state.values()
    assert kept["exp_avg"].square().mean().sqrt() == pytest.approx(0.05)  # (1 − β₁)·d


def test_matrices_and_vectors_may_stand_in_one_group() -> None:
    apart, together = Net(), Net()
    two = CAME(groups_of(apart, 0.01), lr=0.01)
    two.param_groups[1]["lr"] = 0.01
    one = CAME(together.parameters(), lr=0.01)
    x, y = batch()
    for _ in range(3):
        for net, optimizer in ((apart, two), (together, one)):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    pairs = zip(apart.parameters(), together.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_factors_of_16_bit_weights_keep_32_bits_through_a_checkpoint() -> None:
    optimizer = stepped(torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16())
    (state,) = optimizer.state.values()
    copied = CAME([Parameter(torch.zeros(4, 6).bfloat16())])
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (loaded,) = copied.state.values()
    assert all(loaded[x].dtype == torch.float32 for x in FACTORS)
    assert all(torch.equal(state[x], loaded[x]) for x in FACTORS)


@pytest.mark.parametrize(
    "how", [{"clip_threshold": 0.0}, {"betas": (0.9, 0.999)}, {"eps": 1e-8}, {"eps": (-1.0, 0.0)}]
)
def test_wrong_settings_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(how))):
        CAME([Parameter(torch.ones(2, 2))], **how)


def quadratic(steps: int = 50, **how: Any) -> tuple[Tensor, CAME]:
    """Weights on their way down a noisy quadratic, and the optimizer."""
    draw = torch.Generator().manual_seed(1)
    w = Parameter(torch.randn(96, 128, generator=draw))
    optimizer = CAME([w], lr=0.01, **how)
    for _ in range(steps):
        w.grad = w.detach() + torch.randn(96, 128, generator=draw)
        optimizer.step()
    return w.detach(), optimizer


# Measured: 0.0016, 0.0074, 0.0099 and 0.10 of the way.
@pytest.mark.parametrize(
    ("state_dtype", "bound"), [("bfloat16", 2e-3), ("int8", 0.01), ("fp8", 0.013), ("int4", 0.13)]
)
def test_a_momentum_of_few_bits_takes_nearly_the_same_way(state_dtype: Any, bound: float) -> None:
    start, _ = quadratic(0)
    plain, few = quadratic()[0], quadratic(state_dtype=state_dtype)[0]
    apart = float((few - plain).norm() / (plain - start).norm())
    assert 0 < apart < bound


def test_an_int8_momentum_takes_a_byte_a_parameter() -> None:
    _, optimizer = quadratic(1, state_dtype="int8")
    (state,) = optimizer.state.values()
    momentum = state["exp_avg"]
    assert momentum.codes.nbytes + momentum.scales.nbytes == 96 * 128 * (1 + 4 / 256)
    assert sum(state[x].nbytes for x in FACTORS) == 4 * 2 * (96 + 128)


@pytest.mark.parametrize("foreach", [None, False])
def test_a_run_with_an_int8_momentum_resumes_to_the_bit(foreach: bool | None) -> None:
    how: dict[str, Any] = {"state_dtype": "int8", "foreach": foreach}
    w, first = quadratic(5, **how)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = CAME([Parameter(w.clone())], lr=0.01, **how)
    second.load_state_dict(torch.load(file, weights_only=True))
    for optimizer in (first, second):
        (param,) = optimizer.param_groups[0]["params"]
        for _ in range(3):
            param.grad = param.detach().cos()
            optimizer.step()
    (one,), (other,) = first.state, second.state
    assert torch.equal(one, other)


def test_errors_of_bfloat16_weights_are_kept() -> None:
    w = Parameter(torch.ones(8, 8).bfloat16())
    optimizer = CAME([w], lr=1e-5, weight_rounding="compensated", clip_threshold=0.1)
    for _ in range(200):
        w.grad = torch.ones_like(w)
        optimizer.step()
    plain = Parameter(torch.ones(8, 8).bfloat16())
    lost = CAME([plain], lr=1e-5, clip_threshold=0.1)
    for _ in range(200):
        plain.grad = torch.ones_like(plain)
        lost.step()
    assert (plain == 1).all()
    assert (w < 1).all()
