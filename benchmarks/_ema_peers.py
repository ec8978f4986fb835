"""Averages of weights that `benchmarks/ema.py --beside` times next to ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks._peers import found_member, present
from lightning_ext import kernels
from lightning_ext.callbacks._averaged_weights import AveragedWeights

OURS = "callbacks.EMA"
KERNEL, LERP = "kernels.ema_update_", "torch._foreach_lerp_"
PACKAGES = ("ema_pytorch", "timm")


class Average(NamedTuple):
    """One update of an average, and the tensors that it changes."""

    update: Callable[[], Any]
    tensors: Callable[[], list[Tensor]]


def averages(weights: nn.Module, decay: float) -> dict[str, Average]:
    """Ours and those of the packages that are there, all begun at the weights as they are."""
    made = {OURS: ours(weights, decay)}
    # What Lightning's EMAWeightAveraging does at a step, and torch's faster form of the same.
    made["Lightning EMAWeightAveraging"] = of_torch(weights, avg_fn=get_ema_avg_fn(decay))
    multi = get_ema_multi_avg_fn(decay)
    made["torch AveragedModel multi_avg_fn"] = of_torch(weights, multi_avg_fn=multi)
    if present("ema_pytorch"):
        made["ema_pytorch EMA"] = of_ema_pytorch(weights, decay)
    if present("timm"):
        made["timm ModelEmaV3"] = of_timm(weights, decay)
    return made


def calls_of_lists(weights: nn.Module, decay: float) -> dict[str, Average]:
    """Our kernel and torch's call, of lists that are there: no module is walked."""
    values: list[Tensor] = list(weights.parameters())
    one, other = ([x.detach().clone() for x in values] for _ in range(2))
    return {
        KERNEL: Average(lambda: kernels.ema_update_(one, values, decay), lambda: one),
        LERP: Average(lambda: torch._foreach_lerp_(other, values, 1 - decay), lambda: other),
    }


def ours(weights: nn.Module, decay: float) -> Average:
    """What `callbacks.EMA` does in an update: it walks the module, too."""
    average = AveragedWeights(weights)

    def tensors() -> list[Tensor]:
        average.swap_in(weights)
        found = [x.detach().clone() for x in weights.parameters()]
        average.swap_out(weights)
        return found

    return Average(partial(average.update, weights, decay), tensors)


def of_torch(weights: nn.Module, **settings: Any) -> Average:
    """An AveragedModel, whose first update is a copy."""
    model = AveragedModel(weights, use_buffers=True, **settings)
    model.update_parameters(weights)
    return Average(partial(model.update_parameters, weights), lambda: list(model.parameters()))


def of_ema_pytorch(weights: nn.Module, decay: float) -> Average:
    """In its foreach form, at every step, without the warm-up of the decay."""
    kind = found_member("ema_pytorch.EMA")
    settings = {"min_value": decay, "update_after_step": -2, "update_every": 1}
    model = kind(weights, beta=decay, use_foreach=True, include_online_model=False, **settings)
    model.update()  # a copy
    return Average(model.update, lambda: list(model.ema_model.parameters()))


def of_timm(weights: nn.Module, decay: float) -> Average:
    """In its foreach form, which is its default."""
    model = found_member("timm.utils.model_ema.ModelEmaV3")(weights, decay=decay)
    return Average(lambda: model.update(weights), lambda: list(model.module.parameters()))


@torch.no_grad()
def check(weights: nn.Module, decay: float) -> None:
    """Assert that averages of weights that move are those in float64."""
    made = averages(weights, decay) | calls_of_lists(weights, decay)
    truth = [x.detach().double() for x in weights.parameters()]
    for step in range(3):
        for x in weights.parameters():
            x.add_(0.1 * (step + 1))
        for average in made.values():
            average.update()
        truth = [
            y.lerp(x.double(), 1 - decay) for x, y in zip(weights.parameters(), truth, strict=True)
        ]
    exact = torch.cat([x.flatten() for x in truth])
    for name, average in made.items():
        found = torch.cat([x.detach().double().flatten() for x in average.tensors()])
        error = ((found - exact).norm() / exact.norm()).item()
        assert error < 1e-6, f"average of {name}: relative error {error:.2g}"
