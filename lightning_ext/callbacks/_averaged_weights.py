"""The tensors of an average: one for each parameter and persistent buffer, no second module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Module

from lightning_ext._lightning import View


class AveragedWeights:
    """Averages beside a module's tensors; a tensor that two names share is kept once.

    Args:
        module: Its present weights are where the average begins.
    """

    def __init__(self, module: Module) -> None:
        self._tensors = {
            name: tensor.detach().to(_wide(tensor), copy=True)
            for name, tensor in _live(module).items()
        }
        self._raw: dict[str, Tensor] = {}

    @property
    def swapped(self) -> bool:
        """Whether the average is in the module now."""
        return bool(self._raw)

    def to(self, device: torch.device) -> None:
        """Moves the averages to the module's device."""
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self, module: Module, decay: float) -> None:
        """Sets the average to decay × average + (1 − decay) × present; integers are copied."""
        live = _live(module)
        floating = [name for name, tensor in live.items() if tensor.is_floating_point()]
        averages = [self._tensors[name] for name in floating]
        present = [live[name].detach().to(self._tensors[name].dtype) for name in floating]
        if averages:
            torch._foreach_lerp_(averages, present, 1 - decay)
        for name in live.keys() - floating:
            self._tensors[name].copy_(live[name])

    @torch.no_grad()
    def swap_in(self, module: Module) -> None:
        """Puts the average into the module and keeps its raw weights aside."""
        if self.swapped:
            return
        live = _live(module)
        self._raw = {name: tensor.detach().clone() for name, tensor in live.items()}
        for name, tensor in live.items():
            tensor.copy_(self._tensors[name])

    @torch.no_grad()
    def swap_out(self, module: Module) -> None:
        """Puts the raw weights back."""
        live = _live(module) if self.swapped else {}
        for name, tensor in live.items():
            tensor.copy_(self._raw[name])
        self._raw = {}

    def raw(self) -> dict[str, Tensor]:
        """The raw weights by name while they are aside, else nothing."""
        return dict(self._raw)

    def save(self, view: View) -> dict[str, Tensor]:
        """The averages for a checkpoint."""
        return view.save_tensors(self._tensors)

    def load(self, view: View, saved: Mapping[str, Tensor]) -> None:
        """Takes the averages from a checkpoint."""
        self._tensors = view.load_tensors(saved, self._tensors)


def _live(module: Module) -> dict[str, Tensor]:
    persistent = module.state_dict().keys()
    buffers = {name: tensor for name, tensor in module.named_buffers() if name in persistent}
    return {**dict(module.named_parameters()), **buffers}


def _wide(tensor: Tensor) -> torch.dtype:
    # Steps of 1 − decay are lost in half precision.
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)
