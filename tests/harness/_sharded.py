"""FSDP2 on a CPU: by Lightning's own strategy, and by ours."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from lightning_ext.strategies import FSDP2Strategy


def fsdp2(processes: int, tensor_parallel_size: int = 1) -> dict[str, Any]:
    """What a Trainer needs for it; the module shards itself in `configure_model`."""
    strategy = ModelParallelStrategy(processes // tensor_parallel_size, tensor_parallel_size)
    return {"strategy": strategy, "devices": processes}


def fsdp2_strategy(processes: int, **options: Any) -> dict[str, Any]:
    """What a Trainer needs for ours, under a module that does not shard itself.

    Its first layer is a unit, and the rest is gathered with the module.

    Args:
        processes: All of them see different data.
        options: Of the strategy.
    """
    strategy = FSDP2Strategy(**{"wrap": _takes_features} | options)
    return {"strategy": strategy, "devices": processes}


def _takes_features(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.in_features == 6


def shard(net: nn.Sequential, mesh: Any, *, replicas: int = 1, **kwargs: Any) -> None:
    """Shards the first layer by itself, and then the whole.

    Args:
        net: As `Classifier` has it.
        mesh: The module's `device_mesh`, or what is to be used instead.
        replicas: Hybrid sharding, over another mesh of the same ranks, if there are several.
        kwargs: For `fully_shard`.
    """
    data = mesh["data_parallel"]
    if replicas > 1:
        shape = (replicas, data.size() // replicas)
        data = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    fully_shard(net[0], mesh=data, **kwargs)
    fully_shard(net, mesh=data, **kwargs)
