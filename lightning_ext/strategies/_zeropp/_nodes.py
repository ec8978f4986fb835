"""Whether a node's ranks can share a copy of the weights."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_secondary(world_size: int, ranks_per_node: int) -> None:
    """Refuses a secondary partition over one rank.

    Args:
        world_size: Ranks in all.
        ranks_per_node: Those that share a node.

    Raises:
        MisconfigurationException: With what is allowed.
    """
    if ranks_per_node == 1 < world_size:
        raise MisconfigurationException(
            f"hpz=True has a node's ranks share a copy of the weights, and with ranks_per_node=1 on"
            f" {world_size} nodes each would hold a whole one. Allowed are several ranks a node."
            " Hint: hpz=False."
        )
