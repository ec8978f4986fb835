"""Runs of `Classifier` by DeepSpeed and by what it is compared with."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from harness._fits import Classifier, fit, loader
from lightning_ext.strategies import DeepSpeedZeroPPStrategy
from lightning_ext.strategies._deepspeed._cpu import import_deepspeed
from lightning_ext.strategies._deepspeed._weights import whole_weights

Weights = dict[str, Tensor]
# A small model is split and gathered as a large one is, and buffers are no larger than it needs.
SMALL: dict[str, Any] = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}
}
KNOWN_WARNINGS = [
    # DeepSpeed 0.19 on torch 2.13.
    pytest.mark.filterwarnings(
        "ignore:.torch.distributed.(all_gather_into|reduce_scatter)_tensor. is:FutureWarning"
    ),
    # Callbacks that only saved are not needed to go on.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callb:UserWarning"),
    # Its hint is Lightning's; ours is `export`.
    pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3 checkpoint:UserWarning"),
]


def warm_up() -> None:
    """Imports in this process what each of its forks would import, which takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch's compiler imports, for a decorator there
        import_deepspeed()
        for name in ("runtime.zero.muon.muon_optimizer", "runtime.zero.stage3"):
            importlib.import_module(f"deepspeed.{name}")


def deepspeed(**options: Any) -> DeepSpeedZeroPPStrategy:
    """The strategy, for small models."""
    return DeepSpeedZeroPPStrategy(**{"config": SMALL, **options})


def weights_of(module: LightningModule, run: Trainer) -> Weights:
    """Whole weights; all ranks must call."""
    if isinstance(run.strategy, DeepSpeedZeroPPStrategy):
        return whole_weights(module, keep=True)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class AtEnd(Callback):
    """Calls a function while the strategy is still there."""

    def __init__(self, call: Callable[[Trainer, LightningModule], None]) -> None:
        self.call = call

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls it."""
        self.call(trainer, pl_module)


def trained(
    strategy: Any,
    world: int,
    *,
    callbacks: Sequence[Callback] = (),
    module: LightningModule | None = None,
    **kwargs: Any,
) -> tuple[Weights, Trainer]:
    """Weights after a fit on the same data in the same order, and the Trainer.

    Args:
        strategy: `"deepspeed"` for `deepspeed()`, else for the Trainer.
        world: Ranks.
        callbacks: For the Trainer.
        module: By default a `Classifier` without dropout, under SGD with rate 1.
        kwargs: For `fit`.
    """
    kwargs = {"train": loader(shuffle=False), "max_epochs": 1, **kwargs}
    if strategy == "deepspeed":
        strategy = deepspeed()
    module = Classifier("unit", dropout=0.0) if module is None else module
    found: Weights = {}
    last = AtEnd(lambda run, own: found.update(weights_of(own, run)))
    _, run = fit([*callbacks, last], module=module, strategy=strategy, devices=world, **kwargs)
    return found, run


def furthest(one: Weights, other: Weights) -> float:
    """The largest difference of an element, over the largest element."""
    assert one.keys() == other.keys()
    assert all(bool(torch.isfinite(x).all()) for x in one.values())
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    return apart / max(float(x.abs().max()) for x in other.values())
