"""Optimizers whose states wait on the host, and steps that they take."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import optim
from lightning_ext.optim import OffloadedStates

Groups = list[dict[str, Any]]
Make = Callable[[Groups], Optimizer]


def with_ratio(groups: Groups) -> Groups:
    return [{"trust_ratio": True} | x for x in groups]


def matrices(groups: Groups) -> Groups:
    return [{"params": [p for p in x["params"] if p.dim() == 2]} for x in groups]


def by_algorithm(groups: Groups) -> Groups:
    kinds = [("muon", True), ("adamw", False)]
    return [
        {"params": [p for p in x["params"] if (p.dim() > 1) == many], "algorithm": algorithm}
        for x in groups
        for algorithm, many in kinds
    ]


BASES: dict[str, Make] = {
    "AdamW": lambda x: torch.optim.AdamW(x, lr=0.01, amsgrad=True),
    "AdamW, foreach": lambda x: torch.optim.AdamW(x, lr=0.01, foreach=True),
    "AdamW, fused": lambda x: torch.optim.AdamW(x, lr=0.01, fused=True),
    "SGD": lambda x: torch.optim.SGD(x, lr=0.01, momentum=0.9),
    "SGD without momentum": lambda x: torch.optim.SGD(x, lr=0.01),
    "RMSprop": lambda x: torch.optim.RMSprop(x, lr=0.01, centered=True),
    "Adagrad": lambda x: torch.optim.Adagrad(x, lr=0.01),
    "Adadelta": lambda x: torch.optim.Adadelta(x),
    "Adamax": lambda x: torch.optim.Adamax(x, lr=0.01),
    "ASGD": lambda x: torch.optim.ASGD(x, lr=0.01),
    "NAdam": lambda x: torch.optim.NAdam(x, lr=0.01),
    "RAdam": lambda x: torch.optim.RAdam(x, lr=0.01),
    "Rprop": lambda x: torch.optim.Rprop(x, lr=0.01),
    "Adafactor": lambda x: torch.optim.Adafactor(x, lr=0.01),
    "Muon": lambda x: torch.optim.Muon(matrices(x)),
    "AccumAdam": lambda x: optim.AccumAdam(x, lr=0.01, every_n_steps=2, foreach=False),
    "AdamP": lambda x: optim.AdamP(x, lr=0.01, foreach=False),
    "CAME": lambda x: optim.CAME(x, lr=0.01),
    "CAME, int8": lambda x: optim.CAME(x, lr=0.01, state_dtype="int8"),
    "DiffGrad": lambda x: optim.DiffGrad(x, lr=0.01, foreach=False),
    "LAMB": lambda x: optim.LAMB(with_ratio(x), lr=0.01, foreach=False),
    "LARS": lambda x: optim.LARS(with_ratio(x), lr=1.0, foreach=False),
    "Lion": lambda x: optim.Lion(x, lr=0.001, state_dtype="int4"),
    "SGDP": lambda x: optim.SGDP(x, lr=0.01, foreach=False),
    "LowBitAdamW": lambda x: optim.LowBitAdamW(x, lr=0.01),
    "LowBitAdamW, int4": lambda x: optim.LowBitAdamW(x, lr=0.01, state_dtype="int4"),
    "LowBitAdamW, fp8": lambda x: optim.LowBitAdamW(x, lr=0.01, state_dtype="fp8"),
}
# On a CPU these go over several parameters as one, so that roundings depend on what is beside one.
TOGETHER: dict[str, Make] = {
    "AccumAdam": lambda x: optim.AccumAdam(x, lr=0.01, every_n_steps=2),
    "AdamP": lambda x: optim.AdamP(x, lr=0.01),
    "DiffGrad": lambda x: optim.DiffGrad(x, lr=0.01),
    "LAMB": lambda x: optim.LAMB(with_ratio(x), lr=0.01),
    "LARS": lambda x: optim.LARS(with_ratio(x), lr=1.0),
    "NorMuon": lambda x: optim.NorMuon(by_algorithm(x)),
    "SGDP": lambda x: optim.SGDP(x, lr=0.01),
}


def adamw(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


class Run:
    """Parameters of two groups, one of which has a gradient late, one never, one now and then."""

    def __init__(self, make: Make, chunk_bytes: int | None = None, device: str = "cpu") -> None:
        torch.manual_seed(0)
        shapes = [(5, 7), (3,), (96, 64), (2, 3, 3, 3), (64, 80), (7,), ()]
        self.params = [Parameter(torch.randn(x).to(device)) for x in shapes]
        kernel = self.params[3]
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
        self.optimizer: Any = make(
            [{"params": self.params[:3]}, {"params": self.params[3:], "weight_decay": 0.0}]
        )
        if chunk_bytes is not None:
            self.optimizer = OffloadedStates(self.optimizer, chunk_bytes=chunk_bytes)
        self.taken = 0

    def steps(self, count: int) -> Run:
        for _ in range(count):
            t = self.taken = self.taken + 1
            for i, p in enumerate(self.params):
                p.grad = (p.detach() + i + 0.3 * t).sin()
            self.params[1].grad = self.params[1].grad if t > 3 else None
            self.params[2].grad = self.params[2].grad if t % 2 else None
            self.params[5].grad = None
            self.optimizer.step()
        return self

    def saved(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found


def same(one: Run, other: Run) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.params, other.params, strict=True))


def alike(a: Any, b: Any) -> bool:
    """Whether two state dicts hold the same, to the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[x], b[x]) for x in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)
