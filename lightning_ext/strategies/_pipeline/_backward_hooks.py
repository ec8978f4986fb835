"""Hooks around a backward pass that the stages have run already."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def call_backward_hooks(
    part: Tensor, weight: float, plugin: Precision, module: LightningModule
) -> None:
    """Calls ``on_before_backward`` and ``on_after_backward`` of callbacks and of the module.

    Args:
        part: What the batch adds to the loss of the optimizer step; callbacks may weigh it, in
            place.
        weight: By which they have said that they would, and which its gradients have.
        plugin: Of the precision, which calls the hooks.
        module: With its Trainer.

    Raises:
        MisconfigurationException: A hook changed it otherwise.
    """
    before = part.clone()
    plugin.pre_backward(part, module)
    if not (_same(part, before) or _same(part, before * weight)):
        raise MisconfigurationException(
            f"on_before_backward changed the loss from {before.item():.6g} to {part.item():.6g} in"
            " place, and the stages of a pipeline have run their backward passes before. Allowed"
            " is to look at it. Hint: scale the loss in training_step, or scale gradients in"
            " on_before_optimizer_step."
        )
    plugin.post_backward(part, module)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
