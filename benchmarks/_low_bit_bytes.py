"""Bytes of optimizers' states, counted in the storages that they hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import optim

FORMATS = (None, "float32", "bfloat16", "int8", "int4", "fp8")
MATRICES = "2 x 1024 x 1024"
SETTINGS: dict[str, Any] = {"rank": 256}  # as in the table of GaLore's paper, of 1024
OWN: dict[str, dict[str, Any]] = {"APOLLOMini": {"rank": 1}}


def state_bytes(optimizer: Optimizer) -> float:
    """Bytes of states for each parameter, code books and counts of steps and all."""
    storages = {}
    for x in tensors_in([*optimizer.state.values()]):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    entries = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(storages.values()) / entries


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Plain tensors that a state is made of."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from tensors_in(x)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def classes() -> dict[str, type[Optimizer]]:
    """Our optimizers whose states have formats."""
    found = {name: getattr(optim, name) for name in optim.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and "state_dtype" in inspect.signature(kind).parameters
    }


def measured(name: str, format: str | None) -> float:
    """Bytes of states for each parameter of matrices, after two steps."""
    kind: Any = classes()[name]
    known = inspect.signature(kind).parameters
    settings = {k: v for k, v in (SETTINGS | OWN.get(name, {})).items() if k in known}
    torch.manual_seed(0)
    params = [Parameter(torch.randn(1024, 1024)) for _ in range(2)]
    optimizer = kind(params, state_dtype=format, **settings)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return state_bytes(optimizer)
