"""Reads off an operator of torch.distributed what this rank sends by it.

Source: the schemas of torch's ``c10d`` and ``_c10d_functional`` operators, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.distributed_c10d import _resolve_process_group

from lightning_ext.scaling import Traffic, collective_traffic, exchange_traffic

_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})

# Operator, without the underscore that says in place: collective, and argument that is sent.
_OPERATORS = {
    "_allgather_base": ("all_gather", "input_tensor"),
    "allgather": ("all_gather", "input_tensors"),
    "allgather_coalesced": ("all_gather", "input_list"),
    "allgather_into_tensor_coalesced": ("all_gather", "inputs"),
    "all_gather_into_tensor": ("all_gather", "input"),
    "all_gather_into_tensor_out": ("all_gather", "input"),
    "all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "allreduce": ("all_reduce", "tensors"),
    "allreduce_coalesced": ("all_reduce", "tensors"),
    "all_reduce": ("all_reduce", "input"),
    "all_reduce_coalesced": ("all_reduce", "inputs"),
    "alltoall": ("all_to_all", "input_tensors"),
    "alltoall_base": ("all_to_all", "input"),
    "all_to_all_single": ("all_to_all", "input"),
    "batch_p2p_ops": ("send", "tensors"),
    "broadcast": ("broadcast", "tensors"),
    "gather": ("gather", "input_tensors"),
    "isend": ("send", "tensor"),
    "reduce": ("reduce", "tensors"),
    "_reduce_scatter_base": ("reduce_scatter", "input_tensor"),
    "reduce_scatter": ("reduce_scatter", "input_tensors"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "scatter": ("scatter", "input_tensors"),
    "send": ("send", "tensors"),
}
# They carry no data of this rank: a barrier's signals are not counted.
_SILENT = frozenset(
    {
        "_wrap_tensor_autograd",
        "barrier",
        "check_for_nan",
        "irecv",
        "monitored_barrier",
        "recv",
        "recv_any_source",
        "wait_tensor",
    }
)
_ROOTS = ("root_rank", "src", "dst")


class Operator(NamedTuple):
    """An operator that communicates.

    Args:
        name: As torch spells it.
        kind: The collective, one of ``scaling.COLLECTIVES``; ``None`` where it is not known.
        buffers: Name of the argument that holds what is sent.
    """

    name: str
    kind: str | None
    buffers: str


class Place(NamedTuple):
    """Where this rank stands in a group.

    Args:
        size: Ranks of the group.
        rank: Of this one in it.
        local_ranks: Ranks of the group on the node of this one, with it.
    """

    size: int
    rank: int
    local_ranks: frozenset[int]


@cache
def operator_of(func: Any) -> Operator | None:
    """Returns what there is to know of an operator; ``None`` for those that send nothing."""
    if not isinstance(func, OpOverload) or func.namespace not in _NAMESPACES:
        return None
    name = func._opname.removesuffix("_")
    if name in _SILENT:
        return None
    kind, buffers = _OPERATORS.get(name, (None, ""))
    if name == "broadcast" and func.namespace != "c10d":
        buffers = "input"
    return Operator(str(func), kind, buffers)


def named_arguments(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names that the schema gives them."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def place_of(named: Mapping[str, Any], ranks_per_node: int) -> Place:
    """Where this rank stands in the group of a call."""
    given = named.get("process_group", named.get("group_name"))
    if isinstance(given, str):
        group = _resolve_process_group(cast(Any, given))
    else:
        group = given if isinstance(given, dist.ProcessGroup) else dist.ProcessGroup.unbox(given)
    ranks = dist.get_process_group_ranks(group)
    rank = group.rank()
    nodes = [one // ranks_per_node for one in ranks]
    local = frozenset(index for index, node in enumerate(nodes) if node == nodes[rank])
    return Place(len(ranks), rank, local)


def sent_by(operator: Operator, named: Mapping[str, Any], place: Place) -> list[Traffic]:
    """The traffic of this rank, one for each message that was ordered by itself."""
    buffers = named[operator.buffers]
    if "op_list" in named:
        calls = zip(named["op_list"], named["peer_list"], buffers, strict=True)
        return [_traffic("send", x, {"dst": to}, place) for op, to, x in calls if op == "isend"]
    return [_traffic(str(operator.kind), buffers, named, place)]


def _traffic(kind: str, buffers: Any, named: Mapping[str, Any], place: Place) -> Traffic:
    parts = _parts(kind, buffers, named)
    if parts:
        return exchange_traffic(parts, rank=place.rank, local_ranks=place.local_ranks)
    root = next((named[name] for name in _ROOTS if name in named), None)
    return collective_traffic(
        kind,
        _num_bytes(buffers),
        size=place.size,
        local=len(place.local_ranks),
        root=root == place.rank,
        peer_local=None if root is None else root in place.local_ranks,
    )


def _parts(kind: str, buffers: Any, named: Mapping[str, Any]) -> list[int]:
    """Bytes for each rank of the group, where a call says them one by one."""
    splits = named.get("input_split_sizes")
    if splits:
        row = _num_bytes(buffers) // max(1, len(buffers))
        return [int(rows) * row for rows in splits]
    if kind == "all_to_all" and not isinstance(buffers, Tensor):
        return [_num_bytes(x) for x in buffers]
    if kind in ("reduce_scatter", "scatter") and not isinstance(buffers, Tensor):
        return [_num_bytes(x) for x in _only_list(buffers)]
    return []


def _only_list(buffers: Sequence[Any]) -> Sequence[Any]:
    """The inner list of lists of tensors, of which there is one; none on ranks that only receive.

    Coalesced collectives have a plain list, of whole buffers.
    """
    return buffers[0] if buffers and not isinstance(buffers[0], Tensor) else ()


def _num_bytes(x: Any) -> int:
    if not isinstance(x, Tensor):
        return sum(_num_bytes(one) for one in x)
    if x.layout is torch.sparse_coo:
        return _num_bytes((x._indices(), x._values()))
    return x.numel() * x.element_size()
