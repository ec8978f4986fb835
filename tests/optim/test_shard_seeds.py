"""Ranks round what they hold by bits of their own, and replicas by the same."""

import torch
from harness import run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from lightning_ext.optim import LowBitAdamW


def moved(placement: Replicate | Shard) -> torch.Tensor:
    """Which entries of what a rank holds have moved: about half, by chance."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.ones(2, 4096, dtype=torch.bfloat16)
    weight = Parameter(distribute_tensor(whole, mesh, [placement]))
    weight.grad = torch.ones_like(weight)
    how = {"weight_rounding": "stochastic", "weight_decay": 0.0, "state_dtype": None}
    LowBitAdamW([weight], 2**-9, **how).step()
    return weight.to_local()[0].detach() != 1


def both() -> list[torch.Tensor]:
    return [moved(Shard(0)), moved(Replicate())]


def test_ranks_round_by_bits_of_their_own_and_replicas_by_the_same() -> None:
    (one, replica), (other, same) = run_distributed(both)
    assert 0.4 < one.float().mean() < 0.6
    assert 0.4 < (one == other).float().mean() < 0.6
    assert replica.equal(same)
