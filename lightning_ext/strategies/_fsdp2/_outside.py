"""Calls of submodules outside of a step, where the root has not gathered their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ext._lightning import reshard
from lightning_ext.strategies._fsdp2._sharding import outermost_sharded


def gather_when_called(module: nn.Module) -> list[RemovableHandle]:
    """Has the modules that own parameters of a root's gather them, if nobody has.

    A hook such as ``on_validation_epoch_end`` may call ``self.net(x)``; FSDP2 gathers for the
    root's own calls alone. What is gathered so is let go of after the next backward
    pass, or step of an optimizer. No gradient would come from it to the parts that ranks hold, so
    that it needs ``no_grad``.

    Args:
        module: A module of FSDP2, or one with such in it.

    Returns:
        Handles of the hooks, which raise a ``MisconfigurationException`` where a gradient would be
        lost.
    """
    names = {one: name for name, one in module.named_modules()}
    return [
        one.register_forward_pre_hook(partial(_gather, root, names[one], names[root] or "the step"))
        for root in cast(list[Any], outermost_sharded(module))
        for one in _of_root(root)
        if any(True for _ in one.parameters(recurse=False))
    ]


def let_go_after_steps(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[RemovableHandle]:
    """Has what is gathered let go of when an optimizer steps, as it is of before the step.

    Args:
        module: With everything sharded.
        optimizers: Of its parameters, stepped by the Trainer or by the user.

    Returns:
        Handles of the hooks.
    """
    return [one.register_step_post_hook(lambda *_: reshard(module)) for one in optimizers]


def _gather(root: FSDPModule, name: str, caller: str, module: nn.Module, args: Any) -> None:
    parts = [one for one in module.parameters(recurse=False) if isinstance(one, DTensor)]
    if torch.is_grad_enabled() and any(one.requires_grad for one in parts):
        raise MisconfigurationException(
            f"{name} was called outside of {caller}, whose forward pass gathers its parameters:"
            f" gradients would not reach them. Hint: call it under torch.no_grad(), or within"
            f" {caller}, or make it a unit that gathers by itself, such as"
            f" wrap=[{type(module).__name__}]."
        )
    if parts:
        root.unshard()


def _of_root(module: nn.Module) -> list[nn.Module]:
    children = [one for one in module.children() if not isinstance(one, FSDPModule)]
    return [one for child in children for one in (child, *_of_root(child))]
