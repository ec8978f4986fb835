"""Optimizers with moments of few bits, of whole parameters and of parameters that ranks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_ext import optim
from lightning_ext.functional import QuantizedState, decode_state, state_bytes

FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")
# Of two ranks each has whole blocks of the first, and one has nothing of the fourth.
SHAPES = {
    "aligned": (128, 64),
    "cut": (131, 96),
    "conv": (40, 16, 3, 3),
    "one_row": (1, 4200),
    "rare": (65, 80),
    "unused": (64, 70),
    "small": (5, 3),
    "vector": (131,),
}
EMPTY_ON_THE_LAST_OF_FOUR = {"few_rows": (5, 1000), "matrix": (70, 64), "vector": (3,)}
Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]


class Parameters(nn.Module):
    """Parameters of these shapes, the same on all ranks."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=draw) / math.sqrt(math.prod(shape[1:]))
            self.register_parameter(name, nn.Parameter(value.to(dtype)))


def _of_all(make: Callable[..., Optimizer], **settings: Any) -> Callable[..., Optimizer]:
    def made(module: nn.Module, **how: Any) -> Optimizer:
        return make(module.parameters(), **settings | how)

    return made


def _by_vectors(
    make: Callable[..., Optimizer], vectors: dict[str, Any], **settings: Any
) -> Callable[..., Optimizer]:
    def made(module: nn.Module, **how: Any) -> Optimizer:
        found = list(module.parameters())
        groups = [
            {"params": [p for p in found if p.dim() > 1]},
            {"params": [p for p in found if p.dim() < 2], **vectors},
        ]
        return make([x for x in groups if x["params"]], **settings | how)

    return made


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "LowBitAdamW": _of_all(optim.LowBitAdamW, lr=0.01),
    "Lion": _of_all(optim.Lion, lr=0.003, weight_decay=0.1),
    "LAMB": _by_vectors(optim.LAMB, {"trust_ratio": False}, lr=0.01),
    "AdamP": _of_all(optim.AdamP, lr=0.01),
    "NorMuon": _by_vectors(optim.NorMuon, {"algorithm": "adamw"}, lr=0.02, ns_dtype="float32"),
}


def mesh_of(sizes: Sequence[int] = ()) -> DeviceMesh:
    """All ranks in a row, or as many dimensions as are asked for."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    sizes = sizes or (dist.get_world_size(),)
    names = ("replicate", "shard")[-len(sizes) :]
    return init_device_mesh("cpu", tuple(sizes), mesh_dim_names=names)


class Run:
    """Parameters and their optimizer; gradients go by name and count of steps alone.

    Args:
        name: of the optimizer.
        sharded: over all ranks, by fully_shard.
        mesh: of it.
        shapes: of the parameters.
        dtype: of them.
        how: settings of the optimizer.
    """

    def __init__(
        self,
        name: str,
        *,
        sharded: bool = True,
        mesh: Sequence[int] = (),
        shapes: Shapes = SHAPES,
        dtype: torch.dtype = torch.float32,
        **how: Any,
    ) -> None:
        self.module: nn.Module = Parameters(shapes, dtype)
        if sharded:
            fully_shard(self.module, mesh=mesh_of(mesh))
        self.start = self.weights()
        self.optimizer = OPTIMIZERS[name](self.module, **how)
        self.taken = 0

    def give(self) -> None:
        """Set the gradients of the next step; some rows have large ones."""
        for name, param in self.module.named_parameters():
            if name == "unused" or (name == "rare" and self.taken % 2):
                param.grad = None
                continue
            draw = torch.Generator().manual_seed(1000 * self.taken + len(name))
            grad = torch.randn(param.shape, generator=draw)
            sizes = torch.randn(len(param), *[1] * (param.dim() - 1), generator=draw).exp()
            param.grad = split((grad * sizes).to(param.dtype), param)

    def run(self, steps: int) -> Run:
        """Take steps."""
        for _ in range(steps):
            self.give()
            self.optimizer.step()
            self.taken += 1
        return self

    def weights(self) -> Weights:
        """Copies of whole parameters."""
        return {name: whole(p) for name, p in self.module.named_parameters()}

    def moments(self) -> Iterator[tuple[str, str, Any]]:
        """Names of parameter and moment, and what is here of it."""
        for name, param in self.module.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, QuantizedState) or value.dim():
                    yield name, key, value

    def numbers(self) -> Weights:
        """What this rank's moments stand for."""
        return {f"{name}.{key}": numbers_of(x) for name, key, x in self.moments()}

    def bytes(self) -> int:
        """Of this rank's states."""
        found = [x for _, _, x in self.moments()]
        return sum(state_bytes(x.to_local() if isinstance(x, DTensor) else x) for x in found)

    def plain(self) -> bool:
        """Whether the saved state is made of tensors, DTensors where parameters are."""
        states = self.optimizer.state_dict()["state"].values()
        return all(isinstance(x, Tensor) for one in states for x in one.values())


def numbers_of(moment: Any) -> Tensor:
    """What this rank has of a moment, as it is read."""
    if isinstance(moment, QuantizedState):
        return decode_state(moment)
    return (moment.to_local() if isinstance(moment, DTensor) else moment).detach().clone()


def whole(x: Tensor) -> Tensor:
    """A copy of all of a tensor."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def split(x: Tensor, param: Tensor) -> Tensor:
    """A whole tensor as its parameter lies."""
    if not isinstance(param, DTensor):
        return x
    return distribute_tensor(x, param.device_mesh, param.placements, src_data_rank=None)


def distance(found: Weights, truth: Weights, start: Weights) -> float:
    """‖w − w₁‖/‖w₁ − w₀‖ over all parameters."""
    a, b, c = (torch.cat([x[n].double().flatten() for n in truth]) for x in (found, truth, start))
    return float((a - b).norm() / (b - c).norm())


def same(found: Weights, truth: Weights) -> bool:
    """Whether they are the same bit for bit."""
    return found.keys() == truth.keys() and all(torch.equal(found[n], truth[n]) for n in truth)


def own_rows(x: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows of a whole tensor that a rank has."""
    height = -(-len(x) // ranks)
    return x[height * rank : height * (rank + 1)]
