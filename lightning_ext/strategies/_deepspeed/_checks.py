"""What cannot be used beside DeepSpeed's engine."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_ext import optim

# They look at weights, gradients or shapes, which the engine keeps to itself; by name, because this
# room does not know the callbacks.
TOUCHES_PARAMETERS = frozenset(
    {
        "AGVM",
        "AdamInstabilityMonitor",
        "AdaptiveGradientClipping",
        "CriticalBatchSize",
        "Curvature",
        "EMA",
        "GradientNoiseScale",
        "GradientNormRecorder",
        "LargeBatchRecipe",
        "LocalGradients",
        "MicroBatchFinder",
        "NormLoss",
        "PolyakLoss",
        "SharpnessAware",
        "StochasticWeightAveraging",
        "WeightAveraging",
        "WeightDistance",
    }
)
# They look at the shape of a parameter, at a layer as a whole or at all parameters together.
WHOLE_TENSORS: tuple[type[Optimizer], ...] = (
    optim.EGN,
    optim.LAMB,
    optim.LARS,
    optim.LAWN,
    optim.MKOR,
    optim.SGDP,
    optim.VRGD,
    optim.AdaGradNorm,
    optim.AdamP,
    optim.DelayCompensation,
    optim.DistributedLion,
    optim.Gravity,
    optim.MTAdamW,
    optim.NorMuon,
    optim.PolyakSGD,
    torch.optim.Adafactor,
    torch.optim.LBFGS,
    torch.optim.Muon,
)


def check_run(trainer: Trainer) -> None:
    """Refuses callbacks that would find placeholders, and parameters that cannot be split.

    Raises:
        MisconfigurationException: With the callbacks, or the parameters.
    """
    check_callbacks(trainer)
    _check_shapes(trainer.lightning_module)


def check_callbacks(trainer: Trainer) -> None:
    """Refuses callbacks that would find placeholders instead of parameters.

    Raises:
        MisconfigurationException: With the callbacks.
    """
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    found = [
        type(callback).__name__
        for callback in callbacks
        if any(ancestor.__name__ in TOUCHES_PARAMETERS for ancestor in type(callback).__mro__)
    ]
    if found:
        raise MisconfigurationException(
            f"{', '.join(found)} need weights or gradients, which DeepSpeed's engine keeps to"
            " itself. Hint: Trainer(strategy='fsdp2') or 'zeropp', which share them."
        )


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuses optimizers that would compute something else on flat parts of parameters.

    Raises:
        MisconfigurationException: With the class, and why.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, WHOLE_TENSORS):
        raise MisconfigurationException(
            f"{name} looks at whole parameters, and ZeRO-3 of DeepSpeed gives it flat parts of all"
            " of them together: it would compute something else. Allowed are optimizers that treat"
            " every element alike, such as AdamW, SGD and Lion. Hint: Trainer(strategy='fsdp2')."
        )
    if isinstance(optimizer, torch.optim.Adagrad):
        raise MisconfigurationException(
            f"DeepSpeed makes a new {name} of its own, which parameter groups and schedulers of"
            " yours do not reach. Hint: another optimizer, or Trainer(strategy='fsdp2')."
        )


def _check_shapes(module: LightningModule) -> None:
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in module.named_parameters()}
    if found := [name for name, shape in shapes.items() if not len(shape)]:
        raise MisconfigurationException(
            f"DeepSpeed cannot split parameters without a dimension: {', '.join(found)}. Hint: one"
            " element in one dimension, nn.Parameter(torch.tensor([2.0])), or"
            " Trainer(strategy='fsdp2')."
        )
