"""A module whose tensors have shapes, dtypes and devices, and no memory.

Private: ``torch._subclasses.fake_tensor``; the dicts ``_parameters`` and ``_buffers`` of a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from lightning_ext._lightning import untouched
from lightning_ext.callbacks._memory._ranks import Split, shared


class Part(NamedTuple):
    """What a rank holds of parameters.

    Attributes:
        dtype: Of parameters; ``None``: their own.
        split: How they are shared out; ``None``: not at all.
        mesh: The ranks that share.
    """

    dtype: torch.dtype | None = None
    split: Split | None = None
    mesh: DeviceMesh | None = None


WHOLE = Part()


@contextmanager
def faked(
    module: nn.Module,
    device: torch.device,
    part: Part = WHOLE,
) -> Iterator[dict[int, Tensor]]:
    """Has a module fake parameters and buffers, and every new tensor fake; then all is put back.

    Args:
        module: On any device.
        device: The one that kernels are chosen for; nothing is allocated on it.
        part: Of parameters.

    Yields:
        By the identity of each parameter and buffer what stands in its place.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), untouched(module):
        places = [
            (place, name, tensor)
            for child in module.modules()
            for place in (child._parameters, child._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]
        fakes = {id(t): fake_like(t, device, part) for _, _, t in places}
        for place, name, tensor in places:
            place[name] = fakes[id(tensor)]  # type: ignore[assignment]  # a Parameter for one
        yield fakes


def fake_like(
    tensor: Tensor,
    device: torch.device,
    part: Part = WHOLE,
) -> Tensor:
    """Makes a tensor of the same kind and strides, within a mode that makes all of them fake.

    Args:
        tensor: A parameter or another tensor.
        device: Of the new one.
        part: Of parameters.
    """
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": device}
    if not isinstance(tensor, Parameter):
        return torch.empty_strided(tensor.shape, tensor.stride(), **options)
    options["dtype"] = part.dtype or tensor.dtype
    found = torch.empty_strided(tensor.shape, tensor.stride(), **options)
    if part.split is not None and part.mesh is not None and part.split.has(tensor):
        own = part.split.held_by(part.mesh.get_rank(), tensor)
        found = shared(torch.empty(tuple(own), **options), tensor, part.mesh)
    return Parameter(found, requires_grad=tensor.requires_grad)


def fake_batch(batch: Any, device: torch.device) -> Any:
    """Makes a batch of fake tensors; what is no tensor stays.

    Args:
        batch: As a loader yields it.
        device: Of the tensors.
    """
    return pytree.tree_map_only(Tensor, lambda x: fake_like(x.detach(), device), batch)
