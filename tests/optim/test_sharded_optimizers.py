"""Optimizers under FSDP2 on several ranks: one process on the whole batch, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from harness._optimizer_case import Net, Training, batch, groups_of
from harness.optimizer_cases import CASES, _low_rank
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import Optimizer

STEPS = 50
# A parameter without a gradient has no state, but one in an optimizer that never stepped.
LENIENT = StateDictOptions(strict=False)
PARTIAL = DefaultLoadPlanner(allow_partial_load=True)
# Refuse tensor parallelism, or look at backward passes.
PLAIN = ("NorMuon", "MKOR", "MKORH", "VRGD", *_low_rank.CASES)
SHARDED = [name for name, case in CASES.items() if case.sharded]
every = pytest.mark.parametrize("name", SHARDED)


class Sharded:
    """The net of the contract, split over the ranks, and this rank's samples."""

    def __init__(self, name: str, **how: Any) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        case = CASES[name]
        self.module: nn.Module = Net()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(self.module.first, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        self.optimizer: Optimizer = case.make(self.module, groups_of(self.module, case.lr), **how)
        x, y = batch()
        part = slice(dist.get_rank(), None, dist.get_world_size())
        self.take = case.closure(self.module, x[part], y[part])

    def run(self, steps: int) -> Sharded:
        for _ in range(steps):
            self.optimizer.step(self.take)
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in self.module.named_parameters()}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    a, b = (torch.cat([x[name].flatten() for name in truth]) for x in (found, truth))
    return float((a - b).norm() / b.norm())


def train(name: str, how: dict[str, Any]) -> dict[str, Tensor]:
    return Sharded(name, **how).run(STEPS).weights()


def layouts(name: str) -> list[str]:
    """What is wrong with the states' layouts."""
    run = Sharded(name).run(2)
    wrong = []
    states: Any = run.optimizer.state.items()
    if name in _low_rank.CASES:  # owners keep whole tensors, which are split where they are saved
        params = [x for group in run.optimizer.param_groups for x in group["params"]]
        saved = run.optimizer.state_dict()["state"]
        states = [(params[i], state) for i, state in saved.items()]
    for param, state in states:
        for key, value in state.items():
            if value.dim() == 0:
                continue
            if not isinstance(value, DTensor) or value.device_mesh != param.device_mesh:
                wrong.append(f"{key} is no DTensor of the parameter's mesh")
            elif value.shape == param.shape and value.placements != param.placements:
                wrong.append(f"{key} has placements {value.placements}")
    return wrong


def write(name: str, folder: str) -> dict[str, Tensor]:
    run = Sharded(name).run(5)
    model, optimizer = get_state_dict(run.module, run.optimizer)
    save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    return run.run(4).weights()


def read(name: str, folder: str) -> list[dict[str, Tensor]]:
    return [go_on(Sharded(name).run(steps), folder) for steps in (0, 1)]


def go_on(run: Sharded, folder: str) -> dict[str, Tensor]:
    model, optimizer = get_state_dict(run.module, run.optimizer)
    saved = {"model": model, "optimizer": optimizer}
    load(saved, checkpoint_id=folder, planner=PARTIAL)
    set_state_dict(
        run.module,
        run.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=LENIENT,
    )
    return run.run(4).weights()


@every
def test_two_ranks_are_one_process(name: str) -> None:
    for how in ({}, *CASES[name].settings):
        truth = Training(CASES[name], **how).run(STEPS).weights()
        for found in run_distributed(train, 2, args=(name, how)):
            assert error(found, truth) <= 1e-10, how


@pytest.mark.parametrize(
    "name", [x for x in ("LAMB", "LARS", "NorMuon", "AdamP", "SGDP") if x in CASES]
)
def test_four_ranks_are_one_process(name: str) -> None:
    truth = Training(CASES[name]).run(STEPS).weights()
    for found in run_distributed(train, 4, args=(name, {})):
        assert error(found, truth) <= 1e-10


@every
def test_states_are_split_as_their_parameters(name: str) -> None:
    assert run_distributed(layouts, 2, args=(name,)) == [[], []]


@every
def test_checkpoints_of_two_ranks_go_on_in_one_process(name: str, tmp_path: Path) -> None:
    truth = run_distributed(write, 2, args=(name, str(tmp_path)))[0]
    for found in run_distributed(read, 1, args=(name, str(tmp_path)))[0]:
        assert error(found, truth) <= 1e-12


def strided(name: str) -> float:
    """How far a layer under FSDP2 over tensor parallelism goes from a plain one."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8, bias=False)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    parallelize_module(nets[1][0], mesh["tensor"], ColwiseParallel())
    fully_shard(nets[1], mesh=mesh["data"])
    grad = torch.arange(48.0, dtype=torch.float64).view(8, 6) - 10
    for net in nets:
        weight = net[0].weight
        optimizer = CASES[name].make(net, [{"params": [weight]}])
        for step in range(4):
            whole_grad = (grad * (step + 1)).sin()
            if isinstance(weight, DTensor):
                replicas = distribute_tensor(whole_grad, mesh, [Replicate(), Replicate()])
                weight.grad = replicas.redistribute(weight.device_mesh, weight.placements)
            else:
                weight.grad = whole_grad
            optimizer.step((lambda: 2.0) if CASES[name].needs_closure else None)
    return error({"w": whole(nets[1][0].weight)}, {"w": whole(nets[0][0].weight)})


@pytest.mark.parametrize("name", [x for x in SHARDED if CASES[x].from_gradients and x not in PLAIN])
def test_tensor_parallel_layers_are_whole_layers(name: str) -> None:
    assert max(run_distributed(strided, 4, args=(name,))) <= 1e-10
