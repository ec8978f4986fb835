"""Muon's iteration: 4 m²n + 2 m³ operations a step of m × n matrices, m ≤ n, if done in full."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks._gpu._timing import Call, Measurement, compiled, later, ways
from lightning_ext import functional, kernels

STEPS = 5
SHAPES = ((1024, 1024), (1024, 4096), (4096, 4096), (12, 768, 3072))
SMALL = ((8, 12), (2, 8, 12))


def measurements(device: torch.device, small: bool) -> Iterator[Measurement]:
    """Yield matrices and a stack of them, in bfloat16."""
    for shape in SMALL if small else SHAPES:
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        # X Xᵀ, A² and B X; the kernel does half of the first two.
        m, n = sorted(shape[-2:])
        each = 2 * m * m * n + 2 * m**3 + 2 * m * m * n
        yield Measurement(
            thing="newton_schulz",
            mode=f"{STEPS} steps",
            dtype="bfloat16",
            shape=" x ".join(map(str, shape)),
            variants=variants(x, small),
            flops=STEPS * each * (x.numel() // (m * n)),
        )


def variants(x: Tensor, small: bool) -> dict[str, Call]:
    """Return the suite's own, torch's of one matrix after another, and the one that converges."""
    found = ways(lambda fused: kernels.newton_schulz(x, steps=STEPS, fused=fused))
    found["torch.optim.Muon"] = muon(x, compile=False)
    if not small:
        found["torch.optim.Muon compiled"] = muon(x, compile=True)
    # In float32, and six steps.
    found["functional.orthogonalize"] = lambda: functional.orthogonalize(x)
    return found


def muon(x: Tensor, compile: bool) -> Call:
    """Return the iteration of torch's optimizer; it divides its input by the norm."""
    matrices = list(x.clone().flatten(0, -3) if x.ndim > 2 else x.clone()[None])

    def make() -> Call:
        from torch.optim import _muon

        single = _muon._zeropower_via_newtonschulz
        chosen = compiled(single) if compile else single
        return lambda: [chosen(y, (3.4445, -4.7750, 2.0315), STEPS, 1e-7) for y in matrices]

    return later(make)
