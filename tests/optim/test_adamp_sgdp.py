from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
from harness import run_distributed
from harness._optimizer_case import Training
from harness._trajectories import PROBLEMS, Groups, largest_difference
from harness.optimizer_cases import CASES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn import Parameter

from lightning_ext.optim import SGDP, AdamP, BatchScaling

problems = pytest.mark.parametrize("problem", PROBLEMS)
both = pytest.mark.parametrize("optimizer", [AdamP, SGDP])
thresholds = pytest.mark.parametrize("delta", [0.1, 1.0, 10.0])


@thresholds
@problems
@pytest.mark.parametrize("nesterov", [False, True])
def test_adamp_is_that_of_pytorch_optimizer(problem: str, delta: float, nesterov: bool) -> None:
    how: dict[str, Any] = {"weight_decay": 0.1, "delta": delta, "nesterov": nesterov}

    def ours(_: nn.Module, groups: Groups) -> Any:
        return AdamP(groups, eps=1e-12, **how)

    def other(_: nn.Module, groups: Groups) -> Any:
        return pytorch_optimizer.AdamP(groups, eps=1e-12, **how)

    assert largest_difference(ours, other, problem, (0.02, 0.01)) <= 1e-6


@thresholds
@problems
@pytest.mark.parametrize("how", [{}, {"nesterov": True}, {"dampening": 0.5}], ids=str)
def test_sgdp_is_that_of_pytorch_optimizer(problem: str, delta: float, how: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"weight_decay": 0.01, "delta": delta, "momentum": 0.9} | how

    def ours(_: nn.Module, groups: Groups) -> Any:
        return SGDP(groups, **settings)

    def other(_: nn.Module, groups: Groups) -> Any:
        return pytorch_optimizer.SGDP(groups, eps=1e-12, **settings)

    assert largest_difference(ours, other, problem, (0.02, 0.01)) <= 1e-6


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_the_contract_trains_with_and_without_projections(name: str) -> None:
    run = Training(CASES[name])
    seen = set()
    for _ in range(50):
        matrices = run.run(1).optimizer.projected[0]
        assert matrices is not None
        seen |= set(matrices.tolist())
    assert seen == {0.0, 1.0}


def test_without_a_threshold_adamp_is_adamw() -> None:
    found = []
    for make in (lambda p: AdamP(p, delta=0.0), lambda p: torch.optim.AdamW(p, weight_decay=0.0)):
        torch.manual_seed(5)
        w = Parameter(torch.randn(4, 6, dtype=torch.float64))
        optimizer = make([w])
        for _ in range(10):
            w.grad = torch.randn(4, 6, dtype=torch.float64)
            optimizer.step()
        found.append(w.detach())
    torch.testing.assert_close(*found)


def normalized(w: Tensor, noise: float = 0.0) -> Tensor:
    """A loss that does not depend on the rows' norms."""
    target = torch.linspace(-1, 1, w.numel(), dtype=w.dtype).view_as(w)
    seen = target + noise * torch.randn_like(target)
    return -(nn.functional.normalize(w, dim=1) * seen).sum()


def growth(make: Any) -> float:
    """By what weights in front of a norm layer are longer after 200 steps."""
    torch.manual_seed(6)
    w = Parameter(torch.randn(8, 16, dtype=torch.float64))
    before = float(w.detach().norm())
    optimizer = make([w])
    for _ in range(200):
        optimizer.zero_grad()
        normalized(w, noise=1.0).backward()
        optimizer.step()
    return float(w.detach().norm()) / before


def test_weights_in_front_of_a_norm_layer_grow_less() -> None:
    sgd = growth(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9))
    sgdp = growth(lambda p: SGDP(p, lr=1.0))
    adam = growth(lambda p: torch.optim.Adam(p, lr=0.02))
    adamp = growth(lambda p: AdamP(p, lr=0.02))
    assert sgdp - 1 < 0.7 * (sgd - 1)
    assert adamp - 1 < 0.7 * (adam - 1)


@both
def test_a_projected_step_is_tangential_to_every_row(optimizer: Any) -> None:
    w = Parameter(torch.randn(5, 7, dtype=torch.float64))
    run = optimizer([w], lr=0.1)
    for _ in range(3):
        before = w.detach().clone()
        (w.grad,) = torch.autograd.grad(normalized(w), w)
        run.step()
        assert run.projected[0].tolist() == [1.0]
        moved = w.detach() - before
        assert moved.norm() > 1e-3
        assert (moved * before).sum(1).abs().max() < 1e-12


@both
def test_vectors_are_never_projected(optimizer: Any) -> None:
    w = Parameter(torch.tensor([3.0, 4.0]))
    run = optimizer([w], lr=0.1)
    w.grad = torch.tensor([-4.0, 3.0])
    run.step()
    assert run.projected[0].tolist() == [0.0]


@both
def test_what_is_projected_decays_by_a_share(optimizer: Any) -> None:
    w = Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    v = Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    run = optimizer([w, v], lr=0.1, weight_decay=0.01, wd_ratio=0.2)
    w.grad, v.grad = torch.zeros_like(w), torch.zeros_like(v)
    run.step()
    lost = 0.1 * 0.01 * (10 if optimizer is SGDP else 1)
    assert w[0, 0].item() == pytest.approx(3 * (1 - 0.2 * lost), rel=1e-14)
    assert v[0].item() == pytest.approx(3 * (1 - lost), rel=1e-14)


def test_the_decay_of_sgdp_is_that_of_an_l2_penalty_in_sgd() -> None:
    left = []
    for make in (SGDP, torch.optim.SGD):
        v = Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = make([v], lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(1000):
            v.grad = torch.zeros_like(v)
            optimizer.step()
        left.append(v[0].item())
    assert left[0] == pytest.approx(math.exp(-1), rel=0.01)
    assert left[1] == pytest.approx(left[0], rel=0.02)


@pytest.mark.parametrize("rule", ["linear", "linear_samples"])
def test_another_batch_leaves_the_decay_per_sample_of_sgdp(rule: str) -> None:
    optimizer = SGDP([Parameter(torch.ones(2, 2))], lr=0.1, weight_decay=0.01)

    def decay() -> float:
        group = optimizer.param_groups[0]
        return float(group["lr"] * group["weight_decay"] / (1 - group["momentum"]))

    before, inside = decay(), []
    BatchScaling(optimizer, rule=rule).set_kappa(4.0)
    optimizer.step(lambda: inside.append(decay()))
    assert inside == [pytest.approx(4 * before, rel=1e-12)]


def test_the_momentum_of_sgdp_keeps_its_radial_part() -> None:
    w = Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    optimizer = SGDP([w], lr=0.1, momentum=0.5)
    w.grad = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    optimizer.step()
    w.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    optimizer.step()
    assert optimizer.projected[0].tolist() == [1.0]
    assert optimizer.state[w]["momentum_buffer"].tolist() == [[1.0, 1.0]]
    assert w.tolist() == [[0.8, pytest.approx(-0.1)]]


def step_of_columns(name: str) -> str:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = nn.Linear(6, 4)
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    optimizer = {"AdamP": AdamP, "SGDP": SGDP}[name](module.parameters())
    module(torch.ones(2, 6)).sum().backward()
    before = [p.full_tensor().clone() for p in module.parameters()]
    try:
        optimizer.step()
    except ValueError as error:
        after = [p.full_tensor() for p in module.parameters()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_rows_that_are_split_over_ranks_are_refused(name: str) -> None:
    for found in run_distributed(step_of_columns, 2, args=(name,)):
        assert f"{name} needs whole rows, and parameter 0 of shape (4, 6)" in found
        assert "Shard(dim=1)" in found


@both
@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ({"delta": -0.1}, "delta=-0.1"),
        ({"wd_ratio": 1.5}, r"wd_ratio=1.5.*\[0, 1\]"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_settings_out_of_range_are_refused(optimizer: Any, how: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        optimizer([Parameter(torch.ones(2, 2))], **how)


def test_a_momentum_of_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum=1.0.*\[0, 1\)"):
        SGDP([Parameter(torch.ones(2, 2))], momentum=1.0)
