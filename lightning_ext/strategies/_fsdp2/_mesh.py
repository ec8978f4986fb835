"""The mesh of replicas and shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DeviceMesh, init_device_mesh


def check_mesh_shape(shape: tuple[int, int] | None) -> tuple[int, int] | None:
    """Returns (replicate, shard), two counts.

    Args:
        shape: As the user gave it.

    Raises:
        ValueError: It is something else.
    """
    if shape is None:
        return None
    found = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(found) != 2 or not all(isinstance(n, int) and n >= 1 for n in found):
        raise ValueError(
            f"device_mesh={shape!r} is not allowed; it must be (replicate, shard), two integers of"
            " at least 1"
        )
    return found[0], found[1]


def make_mesh(shape: tuple[int, int], world_size: int, device: torch.device) -> DeviceMesh:
    """Makes a mesh of all ranks.

    Args:
        shape: (replicate, shard).
        world_size: Ranks.
        device: Of its collectives.

    Raises:
        MisconfigurationException: They do not multiply to it.
    """
    if shape[0] * shape[1] != world_size:
        raise MisconfigurationException(
            f"device_mesh={shape} has {shape[0] * shape[1]} ranks, and there are {world_size}."
            f" Allowed are (replicate, shard) with replicate·shard={world_size}. Hint: devices and"
            " num_nodes of the Trainer."
        )
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def check_reshard(reshard_after_forward: bool | int, shard_size: int) -> bool | int:
    """Refuses numbers of ranks that do not divide those over which parameters are split.

    On one rank, where nothing is split, any number is ``True``: a script that is for several nodes
    can be tried on one device.

    Args:
        reshard_after_forward: As the user gave it.
        shard_size: Ranks over which a parameter is split.

    Raises:
        MisconfigurationException: With the numbers that do.
    """
    if isinstance(reshard_after_forward, bool):
        return reshard_after_forward
    if shard_size == 1:
        return True
    allowed = [n for n in range(2, shard_size) if shard_size % n == 0]
    told = ", ".join(map(str, allowed))
    if reshard_after_forward not in allowed:
        raise MisconfigurationException(
            f"reshard_after_forward={reshard_after_forward} does not divide the {shard_size} ranks"
            f" over which parameters are split; allowed are {told or 'none'} between 1"
            " and them, True and False. Hint: the ranks of a node."
        )
    return reshard_after_forward
