"""Classes whose moments may have few bits, and parameters of which some do."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import optim

FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")
SHAPES = ((66, 67), (65, 3, 23), (66,), (4, 5), (70, 60))  # the last never has a gradient
LARGE = (0, 1)  # of more than 4096 entries; neither they nor their rows are whole blocks


def _flat(make: Callable[..., Optimizer], **settings: Any) -> Callable[..., Optimizer]:
    def made(params: list[Parameter], **how: Any) -> Optimizer:
        return make([{"params": params[:1]}, {"params": params[1:]}], **settings | how)

    return made


def _by_ratio(make: Callable[..., Optimizer], **settings: Any) -> Callable[..., Optimizer]:
    def made(params: list[Parameter], **how: Any) -> Optimizer:
        matrices, vectors = ([p for p in params if (p.dim() > 1) == k] for k in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "trust_ratio": False}]
        return make(groups, **settings | how)

    return made


def _normuon(params: list[Parameter], **how: Any) -> Optimizer:
    others: dict[str, Any] = {"params": params[1:], "algorithm": "adamw", "lr": 0.01}
    return optim.NorMuon([{"params": params[:1], "algorithm": "muon"}, others], **how)


CLASSES: dict[str, Callable[..., Optimizer]] = {
    "LowBitAdamW": _flat(optim.LowBitAdamW, lr=0.01),
    "Lion": _flat(optim.Lion, lr=0.01, weight_decay=0.1),
    "LAMB": _by_ratio(optim.LAMB, lr=0.01),
    "LARS": _by_ratio(optim.LARS, lr=0.1),
    "AdamP": _flat(optim.AdamP, lr=0.01),
    "SGDP": _flat(optim.SGDP, lr=0.1),
    "DiffGrad": _flat(optim.DiffGrad, lr=0.01),
    "Gravity": _flat(optim.Gravity, lr=0.1),
    "AccumAdam": _flat(optim.AccumAdam, lr=0.01, every_n_steps=3),
    "MTAdamW": _flat(optim.MTAdamW, lr=0.01),
    "NorMuon": _normuon,
}


class Steps:
    """Parameters and their optimizer; gradients go by the count of steps alone."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **how: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        self.params = [Parameter(torch.randn(x, generator=draw).to(dtype)) for x in SHAPES]
        self.optimizer = CLASSES[name](self.params, **how)
        self.taken = 0

    def give(self) -> None:
        """Set the gradients of the next step."""
        draw = torch.Generator().manual_seed(1 + self.taken)
        for param in self.params[:-1]:
            noise = torch.randn(param.shape, generator=draw)
            param.grad = param.detach() + noise.to(param.dtype)

    def run(self, steps: int) -> Steps:
        """Take steps."""
        for _ in range(steps):
            self.give()
            self.optimizer.step()
            self.taken += 1
        return self

    def saved(self) -> dict[str, Any]:
        """What a file keeps of the optimizer."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found

    def resume(self, other: Steps) -> Steps:
        """Go on where other steps stand, by what a file keeps of them."""
        with torch.no_grad():
            for mine, param in zip(self.params, other.params, strict=True):
                mine.copy_(param)
        self.optimizer.load_state_dict(other.saved())
        self.taken = other.taken
        return self

    def weights(self) -> Tensor:
        """Copies of all entries in a row."""
        return torch.cat([p.detach().flatten() for p in self.params])

    def moments(self, place: int) -> dict[str, Any]:
        """A parameter's states of its own shape."""
        param = self.params[place]
        state = sorted(self.optimizer.state[param].items(), key=lambda item: item[0])
        return {name: x for name, x in state if tuple(x.shape) == tuple(param.shape)}


def same(a: Steps, b: Steps) -> bool:
    """Whether all weights are, bit for bit."""
    return torch.equal(a.weights(), b.weights())
