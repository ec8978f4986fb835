"""Squared norms over lists of tensors: every entry is read once, next to nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks._gpu._timing import Call, Measurement, in_one, ways
from lightning_ext import kernels

SHAPES = {  # name: tensors, and the shape of each
    "800 x 2048": (800, (2048,)),
    "96 x 512 x 256": (96, (512, 256)),
    "24 x 4096 x 4096": (24, (4096, 4096)),
}
FEW = 100  # tensors that are compiled soon
SMALL = {"3 x 5 x 4": (3, (5, 4))}

Thing = tuple[Callable[[bool | None], object], dict[str, Call], int]


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield whole norms, norms of differences, both with a snapshot, and those of units."""
    for shape, (count, sizes) in (SMALL if small else SHAPES).items():
        for dtype in (torch.float32, torch.bfloat16):
            xs = [torch.randn(sizes, device=device, dtype=dtype) for _ in range(count)]
            ys = [torch.randn_like(x) for x in xs]
            read = sum(x.nbytes for x in xs)
            for thing, (call, others, times) in things(xs, ys).items():
                calls = ways(call) | others | in_one(call, small=small or count > FEW)
                name = str(dtype).removeprefix("torch.")
                yield Measurement(thing, "all", name, shape, calls, moved_bytes=times * read)


def things(xs: list[Tensor], ys: list[Tensor]) -> dict[str, Thing]:
    """Return operations, torch's ways to do them and how often entries of one list are moved."""
    found: dict[str, Thing] = {
        "sq_norms": (
            lambda fused: kernels.sq_norms(xs, fused=fused),
            {"torch foreach": lambda: torch.stack(torch._foreach_norm(xs, 2)).norm() ** 2},
            1,
        ),
        "diff_sq_norms": (
            lambda fused: kernels.diff_sq_norms(xs, ys, fused=fused),
            {"torch foreach": lambda: torch._foreach_norm(torch._foreach_sub(xs, ys), 2)},
            2,
        ),
        "accumulated_sq_norms_": (
            lambda fused: kernels.accumulated_sq_norms_(xs, ys, fused=fused),
            {"torch foreach": lambda: accumulated(xs, ys)},
            3,
        ),
    }
    if xs[0].ndim > 1:
        rows = lambda: [torch.linalg.vector_norm(x.flatten(1), dim=1) for x in xs]  # noqa: E731
        found["unit_norms"] = (
            lambda fused: kernels.unit_norms(xs, fused=fused),
            {"torch": rows},
            1,
        )
    return found


def accumulated(xs: list[Tensor], ys: list[Tensor]) -> object:
    """Norms of the changes and of the sums, their products, and the new snapshot."""
    changes = torch._foreach_sub(xs, ys)
    found = [torch._foreach_norm(changes), torch._foreach_norm(xs), torch._foreach_mul(changes, ys)]
    torch._foreach_copy_(ys, xs)
    return [*found[:2], [x.sum() for x in found[2]]]
