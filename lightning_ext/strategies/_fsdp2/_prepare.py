"""Gives parameters memory and values, alike on all ranks, before they are sharded.

Source: Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277, section 3.1), deferred initialization.
Differs: a parameter gets its values before it is cut, in the order in which modules stand, so that
    they do not depend on ranks or units; rank 0's are sent to all, as DDP does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter


class Preparation:
    """Moves modules to the device, fills what is on the meta device, and sends rank 0's values.

    Args:
        root: The module that they are parts of.
        device: Where they go.

    Raises:
        MisconfigurationException: A module on the meta device cannot fill itself.
    """

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        self._device = device
        self._places = _places(root)
        _require_resets(root)

    def prepare(self, module: nn.Module) -> None:
        """Makes ready what a module has itself, and not what those below have.

        Args:
            module: All ranks call with the same.
        """
        if any(one.is_meta for _, one in _own(module)):
            self._fill(module)
        for _, one in _own(module):
            one.data = _of_rank_zero(one.data.to(self._device))

    def _fill(self, module: nn.Module) -> None:
        real = {name: one.detach().clone() for name, one in _own(module) if not one.is_meta}
        for name, one in _own(module):
            if not one.is_meta:
                continue
            made = torch.empty_like(one, device=self._device)
            if isinstance(one, Parameter):
                tied = Parameter(made, one.requires_grad)
                tied.__dict__.update(one.__dict__)
                for owner, place in self._places[id(one)]:
                    owner._parameters[place] = tied
            else:
                module._buffers[name] = made
        reset = _reset(module)
        assert reset is not None  # required at the start
        reset()
        with torch.no_grad():
            for name, values in real.items():
                getattr(module, name).copy_(values)


def to_device(module: nn.Module, device: torch.device) -> None:
    """Moves everything but the parts of parameters, which may rest elsewhere by a policy.

    Args:
        module: With everything sharded.
        device: Where it computes.
    """
    _update_properties(module, device=device)
    module._apply(lambda one: one if isinstance(one, DTensor) else one.to(device))


def _of_rank_zero(values: Tensor) -> Tensor:
    values = values.contiguous()
    if values.numel():
        dist.broadcast(values.view(-1).view(torch.uint8), src=0)  # of any dtype
    return values


def _unsharded(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those below, without what FSDP2 has already."""
    if isinstance(module, FSDPModule):
        return
    yield module
    for child in module.children():
        yield from _unsharded(child)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, one) for name, one in found]


def _places(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By parameter, where it stands: in several places where it is tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((module, name))
    return places


def _reset(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # the latter in MultiheadAttention
        if callable(found := getattr(module, name, None)):
            return found
    return None


def _require_resets(root: nn.Module) -> None:
    empty = [one for one in _unsharded(root) if any(x.is_meta for _, x in _own(one))]
    helpless = {
        type(one).__name__: [name for name, x in _own(one) if x.is_meta]
        for one in empty
        if _reset(one) is None
    }
    if helpless:
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in helpless.items())
        raise MisconfigurationException(
            "Parameters or buffers on the meta device are of modules without a"
            f" `reset_parameters()` that would fill them: {told}. Hint: define it, or build them on"
            " a device."
        )
