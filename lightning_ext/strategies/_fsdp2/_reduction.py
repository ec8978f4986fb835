"""When gradients are reduced, and those that FSDP2 does not reduce."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_ext.strategies._fsdp2._plain import (
    after_backward,
    average_gradients,
    whole_parameters,
)
from lightning_ext.strategies._fsdp2._same_parameters import SameParameters
from lightning_ext.strategies._fsdp2._sharding import sharded_modules
from lightning_ext.strategies._fsdp2._unused import SameLayers, reduce_unused


class Reduction:
    """Sees to the gradients of a sharded module, in each backward pass.

    Args:
        module: With everything sharded, and nothing gathered.
        device: For what ranks ask each other.
        owner: Name of the strategy.
        find_unused_parameters: Whether ranks may use different parameters of a unit.
        sums: Whether the backend is to add up alone, as gloo was once wrong about means.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        owner: str,
        *,
        find_unused_parameters: bool,
        sums: bool,
    ) -> None:
        self._units = sharded_modules(module)
        for unit in self._units.values():
            unit.set_force_sum_reduction_for_comms(sums)
            if find_unused_parameters:
                reduce_unused(unit)
        self._whole = whole_parameters(module)
        self._layers: SameLayers | None = SameLayers(self._units, device)
        self._parameters: SameParameters | None = None
        if not find_unused_parameters:
            self._parameters = SameParameters(module, self._units, device, owner)
        self._is_due = True

    def before_backward(self, loss: Tensor) -> None:
        """Prepares for the backward pass of a loss.

        Args:
            loss: Of which ``backward`` will be called.
        """
        if self._layers is not None and loss.requires_grad:
            self._layers.before_backward()
        if self._parameters is not None and loss.requires_grad:
            self._parameters.before_backward(loss, is_due=self._is_due)
        if self._is_due:
            after_backward(loss, self._end_of_backward)

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Gradients are kept by each rank, for a later backward pass to reduce."""
        self._set_due(False)
        try:
            yield
        finally:
            self._set_due(True)

    def remove(self) -> None:
        """Asks no more whether ranks do the same."""
        self._remove_layers()
        if self._parameters is not None:
            self._parameters.remove()
            self._parameters = None

    def _remove_layers(self) -> None:
        if self._layers is not None:
            self._layers.remove()
            self._layers = None

    def _set_due(self, is_due: bool) -> None:
        self._is_due = is_due
        for unit in self._units.values():
            unit.set_requires_gradient_sync(is_due, recurse=False)

    def _end_of_backward(self) -> None:
        if self._parameters is not None:
            self._parameters.after_backward()
            self._remove_layers()  # the first step has shown what they do
        average_gradients(self._whole)
