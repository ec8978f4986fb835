"""What is seen to before a module is split."""

from __future__ import annotations

from weakref import WeakSet

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ext.strategies._fsdp2._prepare import Preparation
from lightning_ext.strategies._pipeline._parts import Parts

_SPLIT: WeakSet[nn.Module] = WeakSet()


def require_own(module: nn.Module, parts: Parts | None) -> None:
    """Refuses a module of which ranks have let go of parts for another strategy, and the reverse.

    Args:
        module: The LightningModule.
        parts: What the strategy has split before.

    Raises:
        MisconfigurationException: It is of another strategy, or the strategy of another module.
    """
    name = type(module).__name__
    if parts is not None and parts.root is not module:
        raise MisconfigurationException(
            f"{name} is not the {type(parts.root).__name__} that this strategy object has split;"
            " allowed is one module for each. Hint: another PipelineStrategy and Trainer."
        )
    if parts is None and module in _SPLIT:
        raise MisconfigurationException(
            f"{name} was split before, and this rank has only its own stages of it. Allowed are"
            " the same strategy object and Trainer. Hint: a new module, with the weights of"
            " export(path)."
        )


def mark_split(module: nn.Module) -> None:
    """Remembers that ranks are about to let go of parts.

    Args:
        module: The LightningModule.
    """
    _SPLIT.add(module)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Gives parameters on the meta device values, alike on all ranks, which must call.

    All of the module is on the device for that time.

    Args:
        module: The LightningModule.
        device: Of this rank.

    Raises:
        MisconfigurationException: A module on the meta device cannot fill itself.
    """
    if not any(x.is_meta for x in (*module.parameters(), *module.buffers())):
        return
    preparation = Preparation(module, device)
    for one in module.modules():
        preparation.prepare(one)
