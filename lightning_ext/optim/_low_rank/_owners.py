"""Matrices whose rows are on several ranks: each has an owner, which alone keeps its subspace.

Source: Zhao et al. 2024 (GaLore, arXiv:2403.03507) needs whole matrices; dealing as in ``NorMuon``.
Differs: owners depend on the groups alone, not on which gradients there are, as states stay there,
    and group after group: one that is added later moves no owner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_ext.optim._low_rank._states import Layout
from lightning_ext.optim._matrix._owners import deal
from lightning_ext.optim._step._shards import split_over


def process_group(param: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that hold different rows of a parameter; ``None`` where each has all."""
    groups = split_over(param)
    return groups[0] if groups else None


def owners_of(groups: Sequence[Sequence[tuple[Tensor, Layout | None]]]) -> list[int | None]:
    """Return which rank of its process group owns each; ``None`` where all do.

    Args:
        groups: of an optimizer, in order: its parameters, and the layout of each, ``None`` where it
            has no subspace.
    """
    loads: dict[dist.ProcessGroup, list[float]] = {}
    return [owner for pairs in groups for owner in _owners_in(pairs, loads)]


def _owners_in(
    pairs: Sequence[tuple[Tensor, Layout | None]], loads: dict[dist.ProcessGroup, list[float]]
) -> list[int | None]:
    """The same of one group, whose costs come on top of the loads."""
    found: list[int | None] = [None] * len(pairs)
    places: dict[dist.ProcessGroup, list[int]] = {}
    for i, (param, layout) in enumerate(pairs):
        group = None if layout is None else process_group(param)
        if group is not None:
            places.setdefault(group, []).append(i)
    for group, chosen in places.items():
        costs = [_cost(pairs[i][1]) for i in chosen]
        ranks = dist.get_world_size(group)
        owners = deal(costs, ranks, loads.setdefault(group, [0.0] * ranks))
        for i, owner in zip(chosen, owners, strict=True):
            found[i] = owner
    return found


def is_mine(param: Tensor, owner: int | None) -> bool:
    """Whether this rank keeps the subspace of a parameter.

    Args:
        param: the parameter.
        owner: its rank in the parameter's process group, or ``None``.
    """
    group = process_group(param)
    return owner is None or group is None or dist.get_rank(group) == owner


def _cost(layout: Layout | None) -> float:
    """Multiplications of a step, roughly: those of the projections."""
    return 0.0 if layout is None else float(layout.shape[0] * layout.shape[1] * layout.rank)
