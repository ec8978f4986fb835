"""What operations refuse that hold the parts of several ranks."""

from __future__ import annotations

from torch import Tensor


def is_distributed(x: Tensor | None) -> bool:
    """Whether it is a DTensor; torch.distributed need not be loaded to know."""
    return hasattr(x, "to_local")


def check_plain(**tensors: Tensor | float | None) -> None:
    """Refuse DTensors, which operations by tiles, counters or blocks do not know how to split.

    Args:
        tensors: by the names of the caller's arguments.

    Raises:
        TypeError: if one of them is a DTensor.
    """
    for name, x in tensors.items():
        if isinstance(x, Tensor) and is_distributed(x):
            raise TypeError(
                f"{name} is a DTensor; this takes plain tensors. Give what its to_local() returns, "
                "the part of one rank"
            )
