"""Whole matrices out of shards: each on one rank, which works on it for the others.

Source: Li et al. 2025 (NorMuon, arXiv:2510.05491), section 3.2: matrices are dealt to ranks, each
    makes its own orthogonal.
Differs: they are dealt by cost; one all-to-all brings all shards to the owners and one brings all
    results back, for matrices of all shapes together. What depends on rows alone stays with them.
    Who has states of whole matrices says itself who owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_ext.optim._step._shards import Groups, are_plain, split_over

Make = Callable[[Sequence[int], Iterable[Tensor]], Iterable[Tensor]]


def by_owners(
    make: Make,
    params: Sequence[Tensor],
    parts: Sequence[Tensor],
    owners: Sequence[int | None] | None = None,
) -> list[Tensor]:
    """Do for whole matrices what is to be done, of those that are split by their owners alone.

    Args:
        make: takes places in ``params`` and the matrices there, which are put together one by one
            as they are read, and returns others of the same shapes.
        params: parameters, plain or split along dimension 0.
        parts: what this rank holds of a matrix for each: its rows, shape (rows here, columns).
        owners: of each, its rank among those that split it; not read where none do. By default they
            are dealt, by what orthogonal matrices cost.

    Returns:
        What this rank holds of the results, two all-to-alls for each process group; plain matrices
        are made by all ranks.
    """
    if are_plain(params):
        return list(make(range(len(parts)), parts))
    places: dict[tuple[Groups, torch.dtype, torch.device], list[int]] = {}
    for i, (param, part) in enumerate(zip(params, parts, strict=True)):
        places.setdefault((split_over(param), part.dtype, part.device), []).append(i)
    found = list(parts)
    for (groups, *_), chosen in places.items():
        some = [parts[i] for i in chosen]
        heights = [len(params[i]) for i in chosen]
        who = None if owners is None else [owners[i] or 0 for i in chosen]

        def chosen_ones(
            of: Sequence[int], matrices: Iterable[Tensor], chosen: list[int] = chosen
        ) -> Iterable[Tensor]:
            return make([chosen[i] for i in of], matrices)

        if groups:
            made: Iterable[Tensor] = _exchanged(chosen_ones, heights, some, who, groups[0])
        else:
            made = make(chosen, some)
        for i, x in zip(chosen, made, strict=True):
            found[i] = x
    return found


def refuse_other_splits(name: str, param: Tensor, where: str) -> None:
    """Refuse a parameter that is split otherwise than along dimension 0, by one mesh dimension.

    Args:
        name: of the optimizer.
        param: the parameter.
        where: what it is called.

    Raises:
        ValueError: if it is.
    """
    if not isinstance(param, DTensor):
        return
    split = [x for i, x in enumerate(param.placements) if param.device_mesh.size(i) > 1]
    split = [x for x in split if not x.is_replicate()]
    if len(split) > 1 or any(type(x) is not Shard or x.dim != 0 for x in split):
        raise ValueError(
            f"{name} takes matrices split along dimension 0 by one dimension of the mesh, as"
            f" fully_shard does, and {where} has placements {param.placements}. Hint: put it into a"
            ' group with algorithm="adamw"'
        )


def deal(costs: Sequence[float], ranks: int, loads: list[float] | None = None) -> list[int]:
    """Return the owner of each, the dearest first to whom has least; equal ones go round.

    Args:
        costs: of each.
        ranks: how many.
        loads: of each rank beforehand; what is dealt is added.
    """
    owners = [0] * len(costs)
    loads = [0.0] * ranks if loads is None else loads
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners


def rows_of(height: int, ranks: int) -> list[int]:
    """Return how many of a tensor's rows each rank holds.

    Args:
        height: rows of all.
        ranks: how many.
    """
    each = -(-height // ranks)
    return [max(0, min(each, height - each * rank)) for rank in range(ranks)]


def _exchanged(
    make: Make,
    heights: Sequence[int],
    parts: Sequence[Tensor],
    owners: Sequence[int] | None,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Parts of what the owners make."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    widths = [part.shape[1] for part in parts]
    table = [rows_of(height, ranks) for height in heights]
    if owners is None:
        owners = deal([_cost(*shape) for shape in zip(heights, widths, strict=True)], ranks)
    order = sorted(range(len(parts)), key=owners.__getitem__)
    mine = [i for i in order if owners[i] == rank]
    here = [sum(parts[i].numel() for i in order if owners[i] == r) for r in range(ranks)]
    there = [sum(table[i][r] * widths[i] for i in mine) for r in range(ranks)]

    sent = torch.cat([parts[i].flatten() for i in order])
    pieces = _all_to_all(sent, there, here, group).split(
        [table[i][r] * widths[i] for r in range(ranks) for i in mine]
    )
    whole = (torch.cat(pieces[k :: len(mine)]).view(-1, widths[i]) for k, i in enumerate(mine))
    results = make(mine, whole) if mine else []
    made = [x.split(table[i]) for i, x in zip(mine, results, strict=True)]
    back = [x[r].flatten() for r in range(ranks) for x in made]
    returned = torch.cat(back) if back else sent[:0]
    slices = _all_to_all(returned, here, there, group).split([parts[i].numel() for i in order])
    found = dict(zip(order, slices, strict=True))
    return [found[i].view_as(part) for i, part in enumerate(parts)]


def _all_to_all(
    sent: Tensor, received: list[int], sizes: list[int], group: dist.ProcessGroup
) -> Tensor:
    found = sent.new_empty(sum(received))
    dist.all_to_all_single(found, sent, received, sizes, group=group)
    return found


def _cost(rows: int, columns: int) -> float:
    """Multiplications of a step of Newton–Schulz."""
    short, long = sorted((rows, columns))
    return float(short * short * (2 * long + short))
