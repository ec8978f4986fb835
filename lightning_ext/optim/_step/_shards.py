"""Parameters that are split over ranks: what this one holds, and sums and maxima over all of it.

Differs: a DTensor is never gathered here; whoever needs whole rows or matrices says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

Groups = tuple[dist.ProcessGroup, ...]
_PLAIN = {Tensor, Parameter}


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether none of them is a DTensor, or another kind of tensor that holds tensors."""
    return _PLAIN.issuperset(map(type, tensors))


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this rank holds of each tensor, in the same memory."""
    return list(tensors) if are_plain(tensors) else [local_part(x) for x in tensors]


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient split as its parameter is."""
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor):
        return grad
    return grad.redistribute(param.device_mesh, param.placements)


def split_over(tensor: Tensor) -> Groups:
    """Return the groups of ranks that hold different parts of a tensor, one for each dimension.

    Every placement but a replica counts: FSDP2 over tensor parallelism has one of its own.
    """
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(i)
        for i, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )


def shard_index(tensor: Tensor) -> int:
    """Return the number of this rank's part of a tensor; 0 of a plain one, alike on replicas."""
    index = 0
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for i, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                index = index * mesh.size(i) + mesh.get_local_rank(i)
    return index


def reduction(
    params: Sequence[Tensor], *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Callable[[Tensor], Tensor] | None:
    """Return what adds up sums over the ranks that split parameters; ``None`` if none is split.

    Args:
        params: the parameters.
        op: another operation than the sum.

    Returns:
        A function of a tensor of shape (parameters, …), or of one parameter's sums where there is
        one parameter; it returns the same shape, the same on all ranks that split a parameter. One
        all-reduce for each set of ranks.
    """
    if are_plain(params):
        return None
    rows: dict[Groups, list[int]] = {}
    for i, param in enumerate(params):
        groups = split_over(param)
        if groups:
            rows.setdefault(groups, []).append(i)
    if not rows:
        return None

    def reduce(sums: Tensor) -> Tensor:
        whole = sums.reshape(len(params), -1).clone()
        for groups, found in rows.items():
            chosen = whole[found]
            for group in groups:
                dist.all_reduce(chosen, op=op, group=group)
            whole[found] = chosen
        return whole.view_as(sums)

    return reduce


def largest(params: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Return what takes maxima over the ranks that split parameters; ``None`` if none is split.

    Args:
        params: the parameters.

    Returns:
        As ``reduction``; the largest is NaN where a rank has a NaN, which a maximum of its own
        might pass over on some of the ranks.
    """
    reduce = reduction(params, op=dist.ReduceOp.MAX)
    if reduce is None:
        return None

    def reduced(values: Tensor) -> Tensor:
        wrong = values.isnan()
        numbers = values.masked_fill(wrong, -torch.inf)
        found = reduce(torch.stack([numbers, wrong.to(values.dtype)], dim=-1))
        return found[..., 0].masked_fill(found[..., 1] > 0, torch.nan)

    return reduced


def split_as(whole: Tensor, param: Tensor) -> Tensor:
    """Return a tensor that all ranks have, split as a parameter is; nothing is communicated.

    Args:
        whole: of the parameter's shape, on any device.
        param: the parameter.
    """
    if not isinstance(param, DTensor):
        return whole.to(param.device)
    mesh = param.device_mesh
    return distribute_tensor(whole.to(param.device), mesh, param.placements, src_data_rank=None)


def check_rows_whole(name: str, params: Sequence[Tensor]) -> None:
    """Refuse matrices whose rows are cut, for an optimizer that needs them whole on a rank.

    Args:
        name: of the optimizer.
        params: the parameters.

    Raises:
        ValueError: if one of at least two dimensions is split along another one than the first.
    """
    for i, param in enumerate([] if are_plain(params) else params):
        if isinstance(param, DTensor) and param.dim() > 1 and _is_cut(param):
            raise ValueError(
                f"{name} needs whole rows, and parameter {i} of shape {tuple(param.shape)} is "
                f"split as {param.placements}; give it whole rows, that is Shard(0). Hint: "
                "fully_shard without shard_placement_fn, or another optimizer for what tensor "
                "parallelism splits along columns"
            )


def _is_cut(param: DTensor) -> bool:
    mesh = param.device_mesh
    return any(
        getattr(placement, "dim", 0) % param.dim() and mesh.size(i) > 1
        for i, placement in enumerate(param.placements)
    )


def zeros_like_rows(param: Tensor) -> Tensor:
    """Return a zero for each entry of dimension 0, shape (rows, 1, …), split as the parameter is.

    Args:
        param: of at least one dimension; if it is split, then along dimension 0 alone.
    """
    if not isinstance(param, DTensor):
        return param.new_zeros(len(param), *[1] * (param.dim() - 1))
    local = param.to_local()
    shape = torch.Size((len(param), *[1] * (param.dim() - 1)))
    zeros = local.new_zeros(len(local), *[1] * (param.dim() - 1))
    return DTensor.from_local(
        zeros,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=shape,
        stride=tuple([1] * param.dim()),
    )
