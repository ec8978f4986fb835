"""What steps by one parameter at a time, and may be given some of them without the others."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ext.optim._accum_adam import AccumAdam
from lightning_ext.optim._adamp import AdamP
from lightning_ext.optim._came import CAME
from lightning_ext.optim._diffgrad import DiffGrad
from lightning_ext.optim._lamb import LAMB
from lightning_ext.optim._lars import LARS
from lightning_ext.optim._lion import Lion
from lightning_ext.optim._low_bit_adamw import LowBitAdamW
from lightning_ext.optim._matrix._normuon import NorMuon
from lightning_ext.optim._sgdp import SGDP

_OF_TORCH = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam"),
    *("RAdam", "RMSprop", "Rprop", "SGD"),
)
_BY_PARAMETER: tuple[type[Optimizer], ...] = (
    *(AccumAdam, AdamP, CAME, DiffGrad, LAMB, LARS, Lion, LowBitAdamW, NorMuon, SGDP),
    *(getattr(torch.optim, name) for name in _OF_TORCH),
)


def refuse_whole(base: Any) -> None:
    """Refuse an optimizer whose step of a parameter depends on other parameters.

    Args:
        base: any; what is no optimizer is refused elsewhere.

    Raises:
        TypeError: if it is none of those that are known to step by parameter, and its class does
            not say ``steps_by_parameter = True``.
    """
    if not isinstance(base, Optimizer):
        return
    kind = type(base).__name__
    if isinstance(base.__dict__.get("base"), Optimizer):
        raise TypeError(
            f"OffloadedStates goes around the optimizer that takes the steps, and got {kind}, which"
            f" goes around another one. Hint: {kind}(OffloadedStates(...), ...)"
        )
    if getattr(type(base), "steps_by_parameter", isinstance(base, _BY_PARAMETER)):
        return
    raise TypeError(
        f"OffloadedStates steps by some parameters after the others, and {kind} is not known to"
        " step each by itself: it may need all of them at once, or draw by their place. Those known"
        f" are {', '.join(sorted(x.__name__ for x in _BY_PARAMETER))}. Hint: steps_by_parameter ="
        " True in a class of your own of which that is true"
    )


def refuse_groups(base: Optimizer) -> None:
    """Refuse groups that need all parameters, or have a part of them.

    Args:
        base: the optimizer.

    Raises:
        ValueError: if gradients are clipped by the norm of all.
        TypeError: if a parameter is a DTensor, or the driver moves the states.
    """
    for group in base.param_groups:
        if group.get("max_grad_norm") is not None:
            raise ValueError(
                f"OffloadedStates got {type(base).__name__} with max_grad_norm="
                f"{group['max_grad_norm']}, the norm of all gradients, of which it gives some at a"
                ' time. Hint: form="paper", and clip before the step'
            )
        if group.get("paged"):
            raise TypeError(
                "OffloadedStates got states with paged=True, which the driver moves by itself."
                " Hint: one of the two"
            )
        if any(isinstance(x, DTensor) for x in group["params"]):
            raise TypeError(
                "OffloadedStates is for one device, and got a DTensor. Hint: under FSDP2"
                " fully_shard(..., offload_policy=CPUOffloadPolicy()) keeps states on the host"
            )
