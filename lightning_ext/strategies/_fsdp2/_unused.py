"""Whether all ranks run the same layers; where they do not, their collectives mix them up."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

_BACKWARD = "the backward pass"


def reduce_unused(unit: FSDPModule) -> None:
    """Has a unit reduce zeros for parameters that this rank has not used, as others may have.

    Args:
        unit: A module of FSDP2.

    Raises:
        MisconfigurationException: This torch cannot.
    """
    if not hasattr(unit, "set_reduce_scatter_unused_params"):
        raise MisconfigurationException(
            f"find_unused_parameters=True needs torch 2.13, and this is {torch.__version__}. Hint:"
            " multiply what a rank does not use by zero, and add it to the loss."
        )
    unit.set_reduce_scatter_unused_params(True, recurse=False)


class SameLayers:
    """Has ranks agree on each unit before it is gathered in training; a number is sent for each.

    Args:
        units: By name; the same on all ranks.
        device: For what is sent.

    Raises:
        MisconfigurationException: In a forward or backward pass; with what each rank came to.
    """

    def __init__(self, units: Mapping[str, Any], device: torch.device) -> None:
        self._names = [*units, _BACKWARD]
        self._device = device
        self._handles: list[RemovableHandle] = [
            unit.register_forward_pre_hook(partial(self._enter, index), prepend=True)
            for index, unit in enumerate(units.values())
        ]

    def remove(self) -> None:
        """Asks no more."""
        for handle in self._handles:
            handle.remove()

    def before_backward(self) -> None:
        """Agrees on the end of a forward pass."""
        self._agree(len(self._names) - 1)

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._agree(index)

    def _agree(self, index: int) -> None:
        own = torch.tensor([index], device=self._device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        found: list[int] = torch.cat(gathered).tolist()
        if len({*found}) > 1:
            told = ", ".join(f"rank {i}: {self._names[n] or 'all'}" for i, n in enumerate(found))
            raise MisconfigurationException(
                f"Ranks run different layers, and each needs all to gather it ({told}). Hint: run"
                " a layer on every rank and multiply by zero what is not wanted, or take it into a"
                " larger unit by `wrap` and set find_unused_parameters=True."
            )
