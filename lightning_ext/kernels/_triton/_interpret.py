"""Where kernels run: compiled on a CUDA device, or interpreted."""

from __future__ import annotations

import torch
import triton


@triton.jit
def _probe() -> None:
    pass


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


def runs_on(device: torch.device) -> bool:
    """Return whether kernels can be launched on tensors of this device."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability that a kernel is launched for."""
    return (8, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
