"""Parameters that FSDP2 leaves whole: scalars, and what is outside of the roots.

Private: ``torch.autograd.Variable._execution_engine``, as torch's own DDP and FSDP2 use it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor
from torch.nn import Parameter


def scalars(module: nn.Module) -> set[Parameter]:
    """Parameters without a dimension that could be cut."""
    return {one for one in module.parameters() if one.ndim == 0}


def whole_parameters(module: nn.Module) -> list[Parameter]:
    """Parameters that every rank holds whole, while nothing is gathered."""
    return [one for one in module.parameters() if not isinstance(one, DTensor)]


def after_backward(loss: Tensor, call: Callable[[], None]) -> None:
    """Calls at the end of the backward pass of a loss, before anything that follows it.

    Args:
        loss: Of which ``backward`` will be called.
        call: Without arguments.
    """
    engine: Any = Variable._execution_engine
    if loss.requires_grad:
        loss.register_hook(lambda _: engine.queue_callback(call))


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Averages gradients over all ranks, by one collective for each dtype.

    A rank that has not used a parameter counts as zeros, if another has; all ranks must call.

    Args:
        parameters: Whole ones, the same on all ranks; frozen ones are left out.
    """
    kinds: dict[torch.dtype, list[Parameter]] = defaultdict(list)
    for one in parameters:
        if one.requires_grad:
            kinds[one.dtype].append(one)
    for members in kinds.values():
        _average(members)


def _average(members: list[Parameter]) -> None:
    missing = [one for one in members if one.grad is None]
    used = torch.tensor([one.grad is not None for one in members])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
    flat = torch.cat([used.to(gradients[0]), *(one.detach().flatten() for one in gradients)])
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    counts, *means = flat.split([len(members), *(one.numel() for one in members)])
    found = zip(members, counts.tolist() if missing else (), strict=False)
    unused = {one for one, count in found if not count}
    for one, gradient, mean in zip(members, gradients, means, strict=True):
        if one not in unused:
            one.grad = gradient.copy_(mean.view_as(one))
