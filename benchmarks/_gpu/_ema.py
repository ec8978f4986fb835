"""Averages of weights: 12 bytes a parameter in float32, read, read and written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks._gpu._timing import Call, Measurement, in_one, ways
from lightning_ext import kernels

DECAY = 0.999
SHAPES = {  # name: tensors, and the shape of each
    "800 small": (800, (2048,)),
    "96 x 512 x 256": (96, (512, 256)),
    "24 x 4096 x 4096": (24, (4096, 4096)),
}
FEW = 100  # tensors that are compiled soon
SMALL = {"3 x 5": (3, (5,))}


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield averages of weights in float32 and bfloat16, averaged in float32."""
    for shape, (count, sizes) in (SMALL if small else SHAPES).items():
        for dtype in (torch.float32, torch.bfloat16):
            averages = [torch.randn(sizes, device=device) for _ in range(count)]
            values = [torch.randn(sizes, device=device, dtype=dtype) for _ in range(count)]
            entries = sum(x.numel() for x in averages)
            yield Measurement(
                thing="ema_update_",
                mode="step",
                dtype=str(dtype).removeprefix("torch."),
                shape=shape,
                variants=variants(averages, values, small=small),
                moved_bytes=entries * (8 + dtype.itemsize),
            )


def variants(averages: list[Tensor], values: list[Tensor], small: bool) -> dict[str, Call]:
    """Return the suite's own and torch's; compiled where tensors are few."""

    def call(fused: bool | None) -> None:
        kernels.ema_update_(averages, values, DECAY, fused=fused)

    found = ways(call) | in_one(call, small=small or len(values) > FEW)
    if values[0].dtype == averages[0].dtype:
        found["torch foreach"] = lambda: torch._foreach_lerp_(averages, values, 1 - DECAY)
    return found
