"""Settings that are numbers or tensors of one entry: what they may be, and where they are read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def check_number(
    op: str, name: str, value: Any, devices: Collection[torch.device]
) -> Tensor | float:
    """Return a setting as a number or a real tensor of no dimension.

    Args:
        op: the operation's name.
        name: the setting's name.
        value: a number, or a tensor of one entry on the CPU or where the parameters are.
        devices: of the parameters; with several of them, it must be on the CPU.

    Raises:
        TypeError: if it is neither a real number nor a real tensor.
        ValueError: if it has several entries or is on another device.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, (int, float)):
            return value
        if not hasattr(value, "__float__"):
            raise TypeError(
                f"{op} got {name} of type {type(value).__name__}; give a number or a tensor of "
                "one entry"
            )
        return float(value)
    if value.is_complex():
        raise TypeError(f"{op} got {name} in {value.dtype}; give a real number")
    if value.numel() != 1:
        raise ValueError(
            f"{op} got {name} of shape {tuple(value.shape)}; give a number or a tensor of one entry"
        )
    if value.device.type != "cpu" and devices and set(devices) != {value.device}:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(
            f"{op} got {name} on {value.device} and parameters on {names}; give it there or on cpu"
        )
    return value.reshape(())


def on_device(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of no dimension on a device, without waiting for this.

    Args:
        value: a number, or a tensor of one entry, which keeps its dtype.
        device: where it is read.
        dtype: of a number.
    """
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, non_blocking=True)
    return torch.full((), float(value), dtype=dtype, device=device)
