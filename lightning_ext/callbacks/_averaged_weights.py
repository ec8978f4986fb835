"""The tensors of an average: one for each parameter and persistent buffer, no second module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
        persistent = module.state_dict().keys()
        kept = [
            *module.named_parameters(),
            *(b for b in module.named_buffers() if b[0] in persistent),
        ]
        self._tensors = {
            name: tensor.detach().to(_wide(tensor), copy=True) for name, tensor in kept
        }
        self._raw: dict[str, Tensor] = {}

    @property
    def swapped(self) -> bool:
        """Whether the average is in the module now."""
        return bool(self._raw)

    def follow(self, module: Module) -> None:
        """Moves the averages to where the module's tensors are, and widens them with these."""
        for name, tensor in self._live(module).items():
            average = self._tensors[name]
            wide = torch.promote_types(average.dtype, _wide(tensor))
            self._tensors[name] = average.to(tensor.device, wide)

    @torch.no_grad()
    def update(self, module: Module, decay: float) -> None:
        """Sets the average to decay × average + (1 − decay) × present; integers are copied."""
        live = self._live(module)
        floating = [name for name, tensor in live.items() if _has_fractions(tensor)]
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
        live = self._live(module)
        self._raw = {name: tensor.detach().clone() for name, tensor in live.items()}
        for name, tensor in live.items():
            tensor.copy_(self._tensors[name])

    @torch.no_grad()
    def swap_out(self, module: Module) -> None:
        """Puts the raw weights back."""
        live = self._live(module) if self.swapped else {}
        for name, tensor in live.items():
            tensor.copy_(self._raw[name])
        self._raw = {}

    @contextmanager
    def swapped_out(self, module: Module) -> Iterator[None]:
        """Puts the raw weights back for the length of a ``with`` block."""
        self.swap_out(module)
        try:
            yield
        finally:
            self.swap_in(module)

    def raw(self, module: Module) -> dict[str, Tensor]:
        """The raw weights while they are aside, else nothing; by every name that a tensor has."""
        live = self._live(module) if self.swapped else {}
        aside = {id(tensor): self._raw[name] for name, tensor in live.items()}
        names = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        return {name: aside[id(tensor)] for name, tensor in names if id(tensor) in aside}

    def save(self, view: View) -> dict[str, Tensor]:
        """The averages for a checkpoint."""
        return view.save_tensors(self._tensors)

    def load(self, view: View, saved: Mapping[str, Tensor]) -> None:
        """Takes the averages from a checkpoint, in the wider of its dtype and the present one."""
        # A module in double precision is widened only after checkpoints are loaded.
        like = {
            name: tensor.to(torch.promote_types(tensor.dtype, saved[name].dtype))
            for name, tensor in self._tensors.items()
            if name in saved
        }
        self._tensors |= view.load_tensors(saved, like)  # the others begin at present weights

    def _live(self, module: Module) -> dict[str, Tensor]:
        tensors = (*module.named_parameters(), *module.named_buffers())
        return {name: tensor for name, tensor in tensors if name in self._tensors}


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> torch.dtype:
    # Steps of 1 − decay are lost in half precision.
    if not _has_fractions(tensor):
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)
