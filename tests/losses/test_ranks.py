"""Losses over several ranks: those of one process with the whole batch, and what is refused."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_accurate, run_distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_ext import losses

BATCH = 12
PAIR = {"CLIPLoss": {"temperature": 0.1}, "SigLIPLoss": {"bias": -3.0}}
every_name = pytest.mark.parametrize("name", losses.__all__)


def make(name: str, **settings: Any) -> Any:
    return getattr(losses, name)(**PAIR.get(name, {}) | settings).double()


def rows(extra: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, BATCH, 5, generator=generator, dtype=torch.float64)
    more = torch.randn(extra, 5, generator=generator, dtype=torch.float64)
    return x, torch.cat([x + noise, more])


def value_and_grads(loss: Any, x: Tensor, y: Tensor, weight: float = 1.0) -> list[Tensor]:
    x, y = (v.clone().requires_grad_() for v in (x, y))
    value = loss(x, y)
    (weight * value).backward()
    grads = [x.grad, y.grad, *(p.grad for p in loss.parameters())]
    return [value.detach(), *(g for g in grads if g is not None)]


def begin() -> tuple[int, int]:
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def own_share(name: str, settings: dict[str, Any], weight: float) -> list[Tensor]:
    rank, world = begin()
    x, y = (v.chunk(world)[rank] for v in rows())
    return value_and_grads(make(name, **settings), x, y, weight)


@every_name
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_loss_and_gradients_of_one_process(name: str, world: int) -> None:
    found = run_distributed(own_share, world, args=(name, {}, 0.7))
    value, dx, dy, *numbers = value_and_grads(make(name), *rows(), 0.7)
    for own in found:  # the loss, and gradients of scale and bias, are the same on all
        torch.testing.assert_close([own[0], *own[3:]], [value, *numbers], rtol=1e-12, atol=1e-12)
    got = [torch.cat([own[i] for own in found]) / world for i in (1, 2)]
    torch.testing.assert_close(got, [dx, dy], rtol=1e-12, atol=1e-12)


def in_low_precision(name: str, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    rank, world = begin()
    x, y = (v.chunk(world)[rank].to(dtype) for v in rows())
    return value_and_grads(make(name, fused=fused).float(), x, y)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, False)])
@every_name
def test_kernels_and_low_precision_are_as_accurate(
    name: str, dtype: torch.dtype, fused: bool
) -> None:
    low = [v.to(dtype) for v in rows()]
    truth = value_and_grads(make(name), *(v.double() for v in low))
    one = value_and_grads(make(name, fused=False).float(), *low)
    for own in (found := run_distributed(in_low_precision, args=(name, dtype, fused))):
        for i in (0, *range(3, len(own))):
            assert_accurate(own[i].to(dtype), truth[i], torch_out=one[i].to(dtype))
    for i in (1, 2):
        got = torch.cat([own[i] for own in found]) / 2
        assert_accurate(got, truth[i], torch_out=one[i])


@every_name
def test_without_gathering_each_rank_is_by_itself(name: str) -> None:
    found = run_distributed(own_share, 2, args=(name, {"gather_features": False}, 1.0))
    for rank, own in enumerate(found):
        alone = value_and_grads(make(name), *(v.chunk(2)[rank] for v in rows()))
        torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-12)


def further_keys() -> list[Tensor]:
    rank, world = begin()
    x, y = rows(extra=4)
    keys = torch.cat([y[:BATCH].chunk(world)[rank], y[BATCH:].chunk(world)[rank]])
    return value_and_grads(make("InfoNCELoss"), x.chunk(world)[rank], keys)


def test_further_keys_are_negatives_to_all_ranks() -> None:
    found = run_distributed(further_keys)
    value, dx, dy = value_and_grads(make("InfoNCELoss"), *rows(extra=4))
    half = BATCH // 2
    keys = [torch.cat([own[2][part] for own in found]) for part in (slice(half), slice(half, None))]
    got = [found[1][0], torch.cat([own[1] for own in found]) / 2, torch.cat(keys) / 2]
    torch.testing.assert_close(got, [value, dx, dy], rtol=1e-12, atol=1e-12)


def in_groups() -> Tensor:
    rank, _ = begin()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    x, y = (v.chunk(2)[rank // 2] for v in rows())
    return make("CLIPLoss", process_group=groups[rank % 2])(x, y)


def test_a_process_group_says_who_shares() -> None:
    expected = make("CLIPLoss")(*rows()).detach()
    for value in run_distributed(in_groups, 4):
        torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)


def in_a_strange_group() -> None:
    rank, _ = begin()
    groups = [dist.new_group([0]), dist.new_group([1])]
    make("CLIPLoss", process_group=groups[1 - rank])(*rows())


def test_a_group_without_this_rank_is_refused() -> None:
    for error in run_distributed(in_a_strange_group, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert "does not have this rank" in str(error)


class Towers(torch.nn.Module):
    """Two encoders; the loss may be a part of what DDP wraps."""

    def __init__(self, loss: torch.nn.Module | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image, self.text = (torch.nn.Linear(5, 4).double() for _ in range(2))
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        found = self.image(x), self.text(y)
        return found if self.loss is None else self.loss(*found)


def trained(name: str, inside: bool, steps: int = 5) -> dict[str, Tensor]:
    loss = make(name)
    towers = Towers(loss if inside else None)
    rank, world = begin() if "RANK" in os.environ else (0, 1)
    net: Any = DistributedDataParallel(towers) if world > 1 else towers
    parameters = [*towers.parameters(), *([] if inside else loss.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    x, y = (v.chunk(world)[rank] for v in rows())
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x, y) if inside else loss(*net(x, y))).backward()
        optimizer.step()
    return {k: v.detach() for k, v in [*towers.state_dict().items(), *loss.state_dict().items()]}


@pytest.mark.parametrize("inside", [True, False])
@every_name
def test_training_under_ddp_is_that_of_one_process(name: str, inside: bool) -> None:
    alone = trained(name, inside)
    for own in run_distributed(trained, args=(name, inside)):
        torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-12)


def frozen(name: str) -> list[Tensor]:
    rank, world = begin()
    loss, (x, y) = make(name), (v.chunk(world)[rank] for v in rows())
    y = y.clone().requires_grad_()
    loss(x, y).backward()
    with torch.no_grad():
        loss(x, y)
    loss(y, x).backward()
    return [y.grad]


@pytest.mark.parametrize("name", ["CLIPLoss", "SigLIPLoss"])
def test_one_side_may_be_frozen(name: str) -> None:
    found = torch.cat([own[0] for own in run_distributed(frozen, args=(name,))]) / 2
    loss, (x, y) = make(name), rows()
    y = y.clone().requires_grad_()
    (loss(x, y) + loss(y, x)).backward()
    torch.testing.assert_close(found, y.grad, rtol=1e-12, atol=1e-12)


def different(what: str, rank: int) -> tuple[Tensor, Tensor]:
    x, y = (v[:6] for v in rows())
    if what == "rows":
        return x[: 6 - rank], y[: 6 - rank]
    if what == "pair on one rank":
        return x, y[: 6 - 2 * rank]
    if what == "dtype":
        return (x, y) if rank else (x.float(), y.float())
    if what == "dimensions":
        return (x, y) if rank else (x[0], y[0])
    return x.clone().requires_grad_(rank == 0), y


DIFFERENCES = ["rows", "pair on one rank", "dtype", "dimensions", "gradient"]


def uneven(name: str) -> list[str]:
    rank, _ = begin()
    told = []
    for what in DIFFERENCES:
        with pytest.raises(ValueError, match="ranks have different features") as raised:
            make(name)(*different(what, rank))
        told.append(str(raised.value))
    make(name)(*rows())  # nobody waits for anybody
    return told


@every_name
def test_uneven_ranks_are_one_error_on_all_of_them(name: str) -> None:
    one, other = run_distributed(uneven, args=(name,), timeout=30)
    assert one == other
    assert "rank 0: (6, 5) torch.float64 without gradient" in one[0]
    assert "rank 1: (5, 5) torch.float64" in one[0]
    assert "gather_features=False" in one[0]
    assert "under AdaptiveBatchSize: DataLoader(drop_last=True)" in one[0]


def frozen_on_one_rank(name: str) -> list[str]:
    rank, _ = begin()
    told = []
    for parameter in dict(make(name).named_parameters()):
        loss = make(name)
        loss.get_parameter(parameter).requires_grad_(rank == 0)
        with pytest.raises(ValueError, match="different features or gradients") as raised:
            loss(*rows())
        told.append(str(raised.value))
        with torch.no_grad():
            loss(*rows())  # nobody goes backward
    return told


def test_a_scale_or_bias_frozen_on_one_rank_is_one_error_on_all_of_them() -> None:
    one, other = run_distributed(frozen_on_one_rank, args=("SigLIPLoss",), timeout=30)
    assert one == other
    assert "gradient, scale trained, bias trained; rank 1" in one[0]
    assert [told.count("scale frozen") for told in one] == [1, 0]
    assert [told.count("bias frozen") for told in one] == [0, 1]
    clip, _ = run_distributed(frozen_on_one_rank, args=("CLIPLoss",), timeout=30)
    assert "gradient, scale frozen)" in clip[0]


def wrong_on_all(name: str) -> None:
    begin()
    x, y = rows()
    make(name)(x, y[:-1])


@every_name
def test_what_is_wrong_on_all_ranks_is_refused_as_on_one(name: str) -> None:
    for error in run_distributed(wrong_on_all, args=(name,), return_exceptions=True):
        assert isinstance(error, ValueError)
        assert "one shape" in str(error)


def twice(name: str) -> str:
    begin()
    x, y = (v.clone().requires_grad_() for v in rows())
    with pytest.raises(RuntimeError, match="differentiated once") as raised:
        make(name)(x, y).backward(create_graph=True)
    return str(raised.value)


@pytest.mark.parametrize("name", ["CLIPLoss", "SigLIPLoss"])
def test_a_second_derivative_is_refused(name: str) -> None:
    assert len(set(run_distributed(twice, args=(name,)))) == 1


def peak_growth(name: str) -> list[float]:
    """MiB by which the peak of a rank grows with a small batch and then a large one."""
    begin()
    loss, peaks = make(name).float(), []
    for count in (64, 4096):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x, y = torch.randn(2, count, 8).unbind()
        loss(x.requires_grad_(), y.requires_grad_()).backward()
        peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    return peaks


@pytest.mark.parametrize("name", ["CLIPLoss", "SigLIPLoss"])
def test_no_rank_holds_the_logits(name: str) -> None:
    for _, grown in run_distributed(peak_growth, args=(name,)):
        assert grown < 64  # the logits of its own rows would be 128 MiB
