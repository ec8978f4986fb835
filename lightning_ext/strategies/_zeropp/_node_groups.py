"""Ranks as nodes times ranks of a node, with the groups that two hops go through."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from lightning_ext.strategies._nodes import uneven


class NodeGroups(NamedTuple):
    """Groups of ranks for a reduction in one or two hops.

    Attributes:
        ranks: of all, in order: rank ``node · ranks_per_node + local`` is the ``local``-th of its
            node.
        ranks_per_node: ranks that share a node.
        local: ranks of this rank's node; ``None`` where a node has one.
        across: ranks with the same place on every node; ``None`` where there is one node.
    """

    ranks: tuple[int, ...]
    ranks_per_node: int
    local: dist.ProcessGroup | None
    across: dist.ProcessGroup | None

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.ranks) // self.ranks_per_node

    def check(self, group: dist.ProcessGroup) -> None:
        """Refuse a reduction over other ranks than these.

        Args:
            group: of the reduction.

        Raises:
            ValueError: if its ranks are others.
        """
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks != self.ranks:
            raise ValueError(
                f"the gradients are to be reduced over ranks {list(ranks)}, but these node groups "
                f"are of ranks {list(self.ranks)}; call node_groups with the group of the mesh "
                "that parameters are sharded over"
            )


def node_groups(
    ranks_per_node: int,
    group: dist.ProcessGroup | None = None,
    *,
    timeout: timedelta | None = None,
) -> NodeGroups:
    """Return the groups inside of nodes and across them; every rank of the group has to call it.

    Args:
        ranks_per_node: ranks that share a node, a divisor of the group's size. Ranks r·k … r·k+k−1
            of the group are one node.
        group: ranks that parameters are sharded over; all by default.
        timeout: of collectives in the new groups; the backend's by default.

    Raises:
        TypeError: if ``ranks_per_node`` is no integer.
        ValueError: if it does not divide the number of ranks.
    """
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    _check_ranks_per_node(ranks_per_node, len(ranks))
    whole, place = group or dist.group.WORLD, ranks.index(dist.get_rank())
    node, local = divmod(place, ranks_per_node)
    inside = ranks[node * ranks_per_node : (node + 1) * ranks_per_node]
    across = ranks[local::ranks_per_node]
    if ranks_per_node == len(ranks):
        return NodeGroups(tuple(ranks), ranks_per_node, whole, None)
    if ranks_per_node == 1:
        return NodeGroups(tuple(ranks), 1, None, whole)
    # Only their members make them, so that ranks of other groups need not take part.
    made = [
        dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        for members in (inside, across)
    ]
    return NodeGroups(tuple(ranks), ranks_per_node, *made)


def _check_ranks_per_node(ranks_per_node: int, world: int) -> None:
    if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, int):
        raise TypeError(f"ranks_per_node={ranks_per_node!r} is no integer")
    if told := uneven(world, ranks_per_node):
        raise ValueError(told)
