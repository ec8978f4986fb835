"""Squared norms of the gradients of one accumulation window, part by part, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_ext import functional


class GradientParts:
    """Hooks on parameters that see the gradient of every backward pass before it is added up.

    Args:
        groups: The parameters to measure, by group.
    """

    def __init__(self, groups: Sequence[Sequence[Parameter]]) -> None:
        self._groups = groups
        self._parts: list[tuple[float, float]] = []
        self._sq_norms: list[Tensor] = []
        self._open: list[list[Tensor]] = [[] for _ in groups]
        self._handles = [
            parameter.register_hook(self._hook(index))
            for index, group in enumerate(groups)
            for parameter in group
            if parameter.requires_grad
        ]

    def begin(self, samples: int, loss_weight: float) -> None:
        """Announces a backward pass over so many samples, whose loss is weighed so."""
        self._parts.append((samples, loss_weight))
        self._open = [[] for _ in self._groups]

    def end(self) -> None:
        """Closes the backward pass."""
        # A group without a gradient counts 0, on the device of the others.
        totals = [functional.sq_norms(()) + sum(found) for found in self._open]
        self._sq_norms.append(_row(totals))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def whole(self, loss_scale: float) -> Tensor:
        """Squared norms of the accumulated gradients as a row, shape (1, 2 + groups).

        Args:
            loss_scale: Factor of the gradient scaler that is still on them.
        """
        found = [functional.sq_norms([p.grad for p in group]) for group in self._groups]
        values = _row(found) / loss_scale**2
        return torch.cat([values.new_zeros(2), values])[None]

    def table(self, accumulate: int, data_parallel_size: int, loss_scale: float) -> Tensor | None:
        r"""A row per part: samples, weight in the whole, squared norms of its mean gradient.

        The hooks have seen :math:`s w / K` times the mean gradient, with the scaler's factor
        :math:`s` and the loss weight :math:`w`; the whole counts the part :math:`w / (K W)`.

        Returns:
            Shape (parts, 2 + groups), or ``None`` if a batch had no backward pass.
        """
        if len(self._sq_norms) != len(self._parts) or not self._parts:
            return None
        rows = []
        for (samples, weight), seen in zip(self._parts, self._sq_norms, strict=True):
            factor = loss_scale * weight / accumulate
            mean = seen / factor**2 if weight else torch.zeros_like(seen)
            head = [samples, weight / (accumulate * data_parallel_size)]
            rows.append(torch.cat([seen.new_tensor(head), mean]))
        return torch.stack(rows)

    def _hook(self, group: int) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self._open[group].append(functional.sq_norms([gradient.detach()]))

        return note


def _row(values: Sequence[Tensor]) -> Tensor:
    """Joins 0-d tensors; zeros made without a device follow the others."""
    device = next((v.device for v in values if v.device.type != "cpu"), None)
    return torch.stack([v.to(device) for v in values])
