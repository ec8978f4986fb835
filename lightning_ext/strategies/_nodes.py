"""Whether ranks make nodes."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_ranks(name: str, value: object, *, least: int, others: tuple[object, ...]) -> None:
    """Refuses what is not a number of ranks.

    Args:
        name: Of the argument.
        value: As the user gave it.
        least: The smallest number that is allowed.
        others: What is allowed besides.

    Raises:
        TypeError: Neither an integer nor one of ``others``.
        ValueError: Less than ``least``.
    """
    if any(type(value) is type(one) and value == one for one in others):
        return
    allowed = ", ".join([f"an integer of at least {least}", *map(repr, others)])
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} was {value!r}; allowed is {allowed}.")
    if value < least:
        raise ValueError(f"{name} was {value}; allowed is {allowed}.")


def uneven(world_size: int, ranks_per_node: int) -> str:
    """Says why ranks do not make nodes; nothing where they do.

    Args:
        world_size: Ranks in all.
        ranks_per_node: Those that share a node.
    """
    if ranks_per_node >= 1 and world_size % ranks_per_node == 0:
        return ""
    allowed = [k for k in range(1, world_size + 1) if world_size % k == 0]
    return (
        f"ranks_per_node={ranks_per_node} does not divide {world_size} ranks into nodes; allowed"
        f" are {allowed}."
    )


def check_nodes(world_size: int, ranks_per_node: int) -> None:
    """Refuses ranks that do not factor into nodes.

    Args:
        world_size: Ranks in all.
        ranks_per_node: Those that share a node.

    Raises:
        MisconfigurationException: With what is allowed.
    """
    if told := uneven(world_size, ranks_per_node):
        raise MisconfigurationException(
            f"{told} Hint: ranks_per_node='auto' takes the Trainer's devices; see its num_nodes."
        )
