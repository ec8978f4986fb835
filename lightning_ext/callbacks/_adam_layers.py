"""Sums over Adam's update, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext import functional, scaling
from lightning_ext._lightning import View
from lightning_ext.scaling import AdamInstability


class Settings(NamedTuple):
    """What a group of Adam used in a step."""

    betas: tuple[float, float]
    eps: float


def adam_layers(
    optimizer: Optimizer, seen: View, used: Sequence[Settings]
) -> dict[str, AdamInstability]:
    """The numbers of every layer, a module that has parameters of its own.

    Args:
        optimizer: Adam after a step, with the gradients of that step.
        seen: Where parameters are split, the ranks' sums are added up.
        used: The settings of that step, by group.
    """
    names = {id(p): name for name, p in seen.local_parameters()}
    sums: list[Tensor] = []
    parameters: list[Parameter] = []
    eps_of: dict[str, float] = {}
    for group, settings in zip(optimizer.param_groups, used, strict=True):
        for parameter in group["params"]:
            if id(parameter) in names and parameter.grad is not None:
                sums.append(_sums(optimizer, parameter, seen, settings))
                parameters.append(parameter)
                eps_of[_layer(names[id(parameter)])] = settings.eps
    layers: dict[str, Tensor] = {}
    if sums:
        whole = seen.reduce_columns(torch.stack(sums, 1), parameters).double()
        for parameter, column in zip(parameters, whole.unbind(1), strict=True):
            layer = _layer(names[id(parameter)])
            layers[layer] = layers[layer] + column if layer in layers else column
    found = {
        layer: scaling.adam_instability(column.tolist(), eps=eps_of[layer])
        for layer, column in layers.items()
    }
    return seen.merge_stages(found)


def _sums(
    optimizer: Optimizer,
    parameter: Parameter,
    seen: View,
    settings: Settings,
) -> Tensor:
    state = optimizer.state[parameter]
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    moments = [functional.decode_state(x) for x in (state["exp_avg"], square)]
    grad, mean, square = seen.local_parts([parameter.grad, *moments])
    if grad is None or mean is None or square is None:
        raise RuntimeError("A gradient and the averages were there a moment ago.")
    step = float(state["step"])
    return functional.adam_instability_sums(
        grad, mean, square, step=step, betas=settings.betas, eps=settings.eps
    )


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
