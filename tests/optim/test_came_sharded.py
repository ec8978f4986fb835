"""CAME of parameters that ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from harness import run_distributed
from harness._optimizer_case import Net, Training, batch, groups_of
from harness.optimizer_cases import CASES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from lightning_ext.optim import CAME

FACTORS = ("sq_row", "sq_col", "res_row", "res_col")


def sharded(steps: int) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of the contract's net, split, and what is wrong with its factors."""
    dist.init_process_group("gloo")
    module: nn.Module = Net()
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    case = CASES["CAME"]
    optimizer = case.make(module, groups_of(module, case.lr))
    x, y = batch()
    part = slice(dist.get_rank(), None, dist.get_world_size())
    take = case.closure(module, x[part], y[part])
    for _ in range(steps):
        optimizer.step(take)
    wrong = []
    for param, state in optimizer.state.items():
        for name in FACTORS if param.dim() > 1 else ():
            local = state[name].to_local()
            is_column = name.endswith("col")
            if state[name].placements[0].is_replicate() != is_column:
                wrong.append(f"{name} is {state[name].placements}")
            if not is_column and local.shape[0] != param.to_local().shape[0]:
                wrong.append(f"{name} has {local.shape}")
            if is_column:
                found = [torch.empty_like(local) for _ in range(dist.get_world_size())]
                dist.all_gather(found, local)
                wrong += [f"{name} differs" for x in found if not torch.equal(x, local)]
    weights = {name: p.full_tensor().detach() for name, p in module.named_parameters()}
    return weights, wrong


def test_shards_without_rows_make_the_same_columns_everywhere() -> None:
    truth = Training(CASES["CAME"]).run(20).weights()
    for weights, wrong in run_distributed(sharded, 4, args=(20,)):
        assert wrong == []
        apart = [float((weights[x] - truth[x]).norm() / truth[x].norm()) for x in truth]
        assert max(apart) <= 1e-10


def few_bits(how: dict[str, Any]) -> Tensor:
    """Weights after 20 steps, of layers that are split where there are ranks."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 70)).double()
    x, y = (torch.randn(32, n, dtype=torch.float64) for n in (64, 70))
    if how.pop("split"):
        dist.init_process_group("gloo")
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = CAME(module.parameters(), lr=3e-3, **how)
    for _ in range(20):
        module.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in found])


def test_shards_of_an_int8_momentum_are_as_near_as_its_rounding() -> None:
    plain = few_bits({"split": False})
    whole = few_bits({"split": False, "state_dtype": "int8"})
    first, second = run_distributed(few_bits, 2, args=({"split": True, "state_dtype": "int8"},))
    assert torch.equal(first, second)
    assert (first - plain).norm() <= 1.5 * (whole - plain).norm()  # blocks begin anew on each rank


def columns_split() -> str:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    w = Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Shard(1)]))
    w.grad = torch.ones_like(w)
    try:
        CAME([w]).step()
    except ValueError as error:
        return str(error)
    return ""


def test_split_rows_are_refused() -> None:
    assert all("CAME needs whole rows" in x for x in run_distributed(columns_split, 2))
