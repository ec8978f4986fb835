"""The low-rank family on several ranks: owners, and checkpoints of any number of ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_ext import optim
from lightning_ext.optim import QGaLore

EVERY = ("GaLore", "QGaLore", "Fira", "GradNormLoRP", "APOLLO", "APOLLOMini")
FORMATS = ("QGaLore", "GradNormLoRP", "APOLLO")
STEPS, MORE = 9, 6


class Net(nn.Module):
    """Rows that ranks share unevenly, fewer rows than columns, a convolution and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(2, 7, 3, dtype=torch.float64)
        self.first = nn.Linear(28, 5, dtype=torch.float64)
        self.last = nn.Linear(5, 9, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x)).flatten(1)
        out: Tensor = self.last(torch.tanh(self.first(hidden)))
        return out


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(12, 2, 6, generator=draw, dtype=torch.float64)
    return x, x[:, 0, :].argmax(1)


class Run:
    """A net on the ranks there are, in one process a plain one."""

    def __init__(self, name: str, how: dict[str, Any], kind: str = "fsdp2", **second: Any) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.module: nn.Module = Net()
        if kind == "ddp":
            self.module = DistributedDataParallel(self.module)
        elif ranks > 1:
            mesh = init_device_mesh("cpu", (ranks,))
            fully_shard(self.module.first, mesh=mesh)
            fully_shard(self.module, mesh=mesh)
        found = list(self.module.parameters())
        second = {"params": found[3:], "lr": 0.01, "rank": 3, **second}
        groups = [{"params": found[:3], "algorithm": "low_rank"}, second]
        settings = {"lr": 0.03, "rank": 2, "update_proj_gap": 4}
        self.optimizer: Optimizer = getattr(optim, name)(groups, **settings | how)
        x, y = data()
        self.x, self.y = x[rank::ranks], y[rank::ranks]

    def run(self, steps: int) -> Run:
        for _ in range(steps):
            self.module.zero_grad()
            nn.functional.cross_entropy(self.module(self.x), self.y).backward()
            self.optimizer.step()
        return self

    def weights(self) -> Tensor:
        found = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.module.parameters()]
        return torch.cat([x.detach().flatten() for x in found])


def train(kind: str = "fsdp2") -> dict[str, Tensor]:
    return {name: Run(name, {}, kind).run(20).weights() for name in EVERY}


def close(found: Tensor, truth: Tensor, bound: float = 1e-10) -> bool:
    return bool((found - truth).norm() <= bound * truth.norm())


def test_ranks_are_one_process() -> None:
    (truth,) = run_distributed(train, 1)
    for ranks, kind in ((2, "ddp"), (3, "fsdp2")):
        for found in run_distributed(train, ranks, args=(kind,)):
            assert [x for x in EVERY if not close(found[x], truth[x])] == []


def settings(name: str) -> dict[str, Any]:
    return {"state_dtype": "int8"} if name in FORMATS else {}


def write(folder: str) -> dict[str, Tensor]:
    found = {}
    for name in EVERY:
        run = Run(name, settings(name)).run(STEPS)
        model, optimizer = get_state_dict(run.module, run.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=f"{folder}/{name}")
        found[name] = run.run(MORE).weights()
    return found


def read(folder: str, steps: int) -> dict[str, Tensor]:
    found = {}
    for name in EVERY:
        run = Run(name, settings(name)).run(steps)
        model, optimizer = get_state_dict(run.module, run.optimizer)
        saved = {"model": model, "optimizer": optimizer}
        load(saved, checkpoint_id=f"{folder}/{name}")
        set_state_dict(
            run.module,
            run.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        found[name] = run.run(MORE).weights()
    return found


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [(2, 1, 0), (1, 2, 0), pytest.param(2, 3, 1, marks=pytest.mark.slow)],
)
def test_checkpoints_are_for_any_number_of_ranks(
    before: int, after: int, steps: int, tmp_path: Path
) -> None:
    truth = run_distributed(write, before, args=(str(tmp_path),))[0]
    for found in run_distributed(read, after, args=(str(tmp_path), steps)):
        assert [x for x in EVERY if not close(found[x], truth[x], 1e-12)] == []


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def comes_back(how: dict[str, Any], **second: Any) -> tuple[bool, int]:
    """Whether a state is the same bits after a load, and how many codes of matrices are here."""
    run = Run("QGaLore", how, **second).run(STEPS)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = Run("QGaLore", how, **second)
    other.module.load_state_dict(run.module.state_dict())
    other.optimizer.load_state_dict(saved)
    again = other.optimizer.state_dict()["state"]
    same = all(
        torch.equal(whole(x), whole(again[i][k]))
        for i, state in saved["state"].items()
        for k, x in state.items()
    )
    moved = bool((run.run(MORE).weights() == other.run(MORE).weights()).all())
    kept = [k for x in other.optimizer.state.values() for k in x]
    return same and moved, sum(x.endswith(("int8", "int4", "fp8")) for x in kept)


def states_come_back() -> list[tuple[bool, int]]:
    found = [comes_back({"state_dtype": x}) for x in ("int8", "int4", "fp8", "bfloat16")]
    return [*found, comes_back({}, algorithm="adamw", min_quantized_numel=0)]


def test_loaded_states_are_the_same_bits_and_lie_with_one_owner() -> None:
    found = run_distributed(states_come_back, 2)
    assert all(same for rank in found for same, _ in rank)
    # Two codes of moments and one of the projection, for each of three matrices, once.
    for ranks in zip(*found, strict=True):
        counts = sorted(count for _, count in ranks)
        assert counts in ([3, 6], [1, 2], [3, 3])


def split_by_columns() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    QGaLore([Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(1)]))], rank=2)


def test_matrices_split_by_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"QGaLore takes matrices split along dimension 0"):
        run_distributed(split_by_columns, 2)


def added_later(later: list[tuple[int, int]]) -> Tensor:
    """Weights behind three steps, and three more with another group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    shapes = [(6, 5), (8, 6), (9, 8)]
    module = nn.ParameterList(draw(x, i) for i, x in enumerate([*shapes, *later]))
    if dist.get_world_size() > 1:
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    params = list(module)
    optimizer = optim.GaLore(params[:3], rank=2)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": params[3:]})
        for i, p in enumerate(params):
            grad = draw(p.shape, 10 * step + i)
            split = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if split else grad.data
        optimizer.step()
    return torch.cat([whole(p).detach().flatten() for p in params])


def draw(shape: Any, seed: int) -> Parameter:
    generator = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


def test_a_group_that_is_added_later_moves_no_owner() -> None:
    later = [(16, 9), (7, 6)]  # the dearest comes last
    (truth,) = run_distributed(added_later, 1, args=(later,))
    assert all(close(x, truth) for x in run_distributed(added_later, 2, args=(later,)))
