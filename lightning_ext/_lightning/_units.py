"""Units of parameters, rows and filters and whole vectors, of which ranks may hold parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_ext import kernels
from lightning_ext._lightning._base_view import View
from lightning_ext._lightning._sharded_view import local_part

Groups = tuple[dist.ProcessGroup, ...]


class Units:
    """Norms and sums over whole units, and over all units, of parameters that ranks may split.

    A row is whole on a rank if its parameter is split along dimension 0 alone, as FSDP2 does. A
    vector never is.

    Args:
        parameters: Plain tensors and DTensors, each with a gradient.
        seen: The view of the run, where ranks may have other layers.
    """

    def __init__(self, parameters: Sequence[Parameter], seen: View | None = None) -> None:
        self._parameters, self._seen = parameters, seen
        counted = parameters if seen is None else seen.counted(parameters)
        self._counted = {id(x) for x in counted}
        self._cut = [_split_over(x, cuts_units=True) for x in parameters]
        self._spread = [_split_over(x, cuts_units=False) for x in parameters]

    def weights(self) -> list[Tensor]:
        """What this rank holds of the parameters."""
        return [local_part(x.detach()) for x in self._parameters]

    def grads(self) -> list[Tensor]:
        """What this rank holds of their gradients, split as they are; in the same memory."""
        return [local_part(_placed_gradient(x)) for x in self._parameters]

    @property
    def count(self) -> int:
        """How many units there are, on all ranks."""
        own = [x for x in self._parameters if id(x) in self._counted]
        return int(self._over_stages(sum(x.shape[0] if x.ndim > 1 else 1 for x in own)))

    def norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Norms of units, whole ones also where this rank holds a part of them.

        Args:
            tensors: What this rank holds of tensors that are split as the parameters, in their
                order, once or several times over.

        Returns:
            As ``kernels.unit_norms``. One reduction for each set of ranks that cut units.
        """
        found = kernels.unit_norms(tensors)
        for groups in dict.fromkeys(filter(None, self._cut)):
            chosen = [i for i in range(len(found)) if self._cut[i % len(self._cut)] == groups]
            squares = torch.cat([found[i].flatten().square() for i in chosen])
            for group in groups:
                dist.all_reduce(squares, group=group)
            whole = squares.sqrt().split([found[i].numel() for i in chosen])
            for i, part in zip(chosen, whole, strict=True):
                found[i] = part.view(found[i].shape).to(found[i].dtype)
        return found

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """Sum over all units, each once; one reduction for each set of ranks that split them.

        Args:
            values: Of each parameter, for each of its units that this rank holds a number.
        """
        if not values:
            return self._over_stages(0.0)
        wide = reduce(torch.promote_types, {x.dtype for x in values}, torch.float32)
        sums = torch.stack([x.sum(dtype=wide) for x in values])
        for groups in dict.fromkeys(filter(None, self._spread)):
            chosen = [i for i, own in enumerate(self._spread) if own == groups]
            part = sums[chosen]
            for group in groups:
                dist.all_reduce(part, group=group)
            sums[chosen] = part
        counted = [id(x) in self._counted for x in self._parameters]
        return self._over_stages(sums[counted].sum())

    def _over_stages(self, value: Tensor | float) -> Tensor:
        """Adds a number up over the stages of a pipeline, where there are any."""
        if self._seen is None or not self._seen.cuts_batches:
            return torch.as_tensor(value)
        device = self._seen.trainer.strategy.root_device
        whole = torch.as_tensor(value, dtype=torch.float64, device=device)
        return self._seen.sum_over_stages(whole)


def _split_over(tensor: Tensor, *, cuts_units: bool) -> Groups:
    """The groups that split a tensor through units, or else between them."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, found = tensor.device_mesh, []
    for i, placement in enumerate(tensor.placements):
        split: Any = placement
        if split.is_replicate() or mesh.size(i) == 1:
            continue
        between = tensor.ndim > 1 and split.dim % tensor.ndim == 0
        if between != cuts_units:
            found.append(mesh.get_group(i))
    return tuple(found)


def _placed_gradient(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    if grad is None:
        raise ValueError("a parameter without a gradient has no units to look at")
    if not isinstance(parameter, DTensor) or not isinstance(grad, DTensor):
        return grad
    if grad.placements != parameter.placements:
        parameter.grad = grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return grad
