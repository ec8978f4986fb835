"""What the ranks of a pipeline hold, brought to rank 0."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.utils._pytree import tree_map


class _Described(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


def to_rank_0(own: dict[str, Any], mesh: DeviceMesh, device: torch.device) -> dict[str, Any]:
    """Puts dicts together, with whole tensors in host memory; all ranks must call.

    One tensor at a time is on its way.

    Args:
        own: Of each pipeline rank under other keys, and of the ranks with the same stages alike.
        mesh: (data_parallel, pipeline).
        device: Of this rank.

    Returns:
        On other ranks than 0 nothing.
    """
    rank, sources = dist.get_rank(), mesh.mesh[0].tolist()
    wire = torch.device("cpu") if dist.get_backend() == "gloo" else device
    described = _gathered(tree_map(_described, own))

    def give(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = _whole(value)
        if rank == 0:
            return whole.to("cpu", copy=True)
        return _send(whole, wire) if rank in sources else None

    found: dict[str, Any] = tree_map(give, own)
    if rank:
        return {}
    for source in sources[1:]:
        receive = partial(_receive, source=source, wire=wire)
        found |= tree_map(receive, described[source], is_leaf=_is_described)
    return found


def _gathered(own: Any) -> list[Any]:
    """Objects of all ranks, on rank 0."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, found)
    return found or []


def _described(value: Any) -> Any:
    return _Described(value.shape, value.dtype) if isinstance(value, Tensor) else value


def _is_described(value: Any) -> bool:
    return isinstance(value, _Described)


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _send(whole: Tensor, wire: torch.device) -> None:
    if whole.numel():
        dist.send(whole.to(wire).contiguous().view(-1).view(torch.uint8), 0)


def _receive(told: Any, source: int, wire: torch.device) -> Any:
    if not isinstance(told, _Described):
        return told
    found = torch.empty(told.shape, dtype=told.dtype, device=wire)
    if found.numel():
        dist.recv(found.view(-1).view(torch.uint8), source)
    return found.cpu()
