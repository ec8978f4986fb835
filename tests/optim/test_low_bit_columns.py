"""Moments of few bits of layers whose rows or columns several ranks have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from harness.low_bit_sharded import whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from lightning_ext.optim import LowBitAdamW

BOUNDS = {"int8": 0.05, "fp8": 0.06, "int4": 0.25}  # ‖w − w₁‖/‖w₁ − w₀‖


def by_columns(format: str | None) -> str:
    dist.init_process_group("gloo")
    module = nn.Linear(96, 64)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    optimizer = LowBitAdamW(module.parameters(), state_dtype=format)
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_columns_on_several_ranks_are_refused(format: str) -> None:
    for text in run_distributed(by_columns, args=(format,)):
        assert f"state_dtype={format!r}" in text
        assert "give it whole rows" in text


def test_columns_on_several_ranks_are_taken_in_float32() -> None:
    assert run_distributed(by_columns, args=("float32",)) == ["", ""]


def tensor_parallel(style: Any, format: str) -> tuple[float, bool] | str:
    """How far weights are from one process, whether second moments are the same; or a refusal."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(64, 258, bias=False)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    parallelize_module(nets[1][0], mesh["tensor"], style())
    fully_shard(nets[1], mesh=mesh["data"])
    optimizers = [LowBitAdamW(x.parameters(), state_dtype=format) for x in nets]
    start = whole(nets[0][0].weight)
    for step in range(5):
        grad = torch.randn(258, 64, generator=torch.Generator().manual_seed(step))
        for net in nets:
            net[0].weight.grad = as_lies(grad, net[0].weight)
        try:
            for optimizer in optimizers:
                optimizer.step()
        except ValueError as error:
            return str(error)
    found, truth = (whole(x[0].weight) for x in nets)
    squares = (whole(x.state_dict()["state"][0][f"exp_avg_sq.{format}"]) for x in optimizers)
    return float((found - truth).norm() / (truth - start).norm()), torch.equal(*squares)


def as_lies(grad: Tensor, weight: Any) -> Tensor:
    """A gradient as its parameter lies; strided shards are made of replicas."""
    if not isinstance(weight, DTensor):
        return grad
    replicas = distribute_tensor(grad, weight.device_mesh, [Replicate(), Replicate()])
    return replicas.redistribute(weight.device_mesh, weight.placements)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_rows_of_tensor_parallel_layers_are_taken(format: str) -> None:
    for error, equal in run_distributed(tensor_parallel, 4, args=(ColwiseParallel, format)):
        assert error <= BOUNDS[format]
        assert equal or format != "int4"


@pytest.mark.slow
def test_columns_of_tensor_parallel_layers_are_refused() -> None:
    for text in run_distributed(tensor_parallel, 4, args=(RowwiseParallel, "int8")):
        assert "state_dtype='int8'" in text
        assert "tensor parallelism splits along columns" in text
