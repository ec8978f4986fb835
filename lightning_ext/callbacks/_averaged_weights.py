"""The tensors of an average: one for each parameter and persistent buffer, no second module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_ext import kernels
from lightning_ext._lightning import View, local_part, reshard


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
        # Sharded and plain tensors in one list are too much for torch; their parts are not.
        averages = [local_part(self._tensors[name]) for name in floating]
        present = [local_part(live[name]) for name in floating]
        kernels.ema_update_(averages, present, decay)
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

    def put_raw(
        self, module: Module, state: dict[str, Any], weights: Callable[[], dict[str, Any]]
    ) -> None:
        """Puts the raw weights into the state for a checkpoint, where it has the average.

        Args:
            module: Where the average may be now.
            state: What is to be saved.
            weights: Makes such a state of the module as it is; all ranks call it.
        """
        if not self.swapped:
            return
        live = self._live(module)
        averaged = {id(tensor) for tensor in live.values()}
        # A tensor that two names share is saved by both.
        named = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        raw = {name for name, tensor in named if id(tensor) not in averaged}
        names = state.keys() - raw  # what other ranks have is not in the module, and averaged
        with self.swapped_out(module):
            # They share memory with the module, which gets the average back.
            state.update({n: x.detach().clone() for n, x in weights().items() if n in names})

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
        reshard(module)
        tensors = (*module.named_parameters(), *module.named_buffers())
        return {name: tensor for name, tensor in tensors if name in self._tensors}


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> torch.dtype:
    # Steps of 1 − decay are lost in half precision.
    if not _has_fractions(tensor):
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)
