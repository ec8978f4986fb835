"""What `benchmarks/gpu.py` times, in slices."""

from __future__ import annotations

from benchmarks._gpu._contrastive import measurements as contrastive
from benchmarks._gpu._ema import measurements as ema
from benchmarks._gpu._newton_schulz import measurements as newton_schulz
from benchmarks._gpu._normalization import measurements as normalization
from benchmarks._gpu._norms import measurements as norms
from benchmarks._gpu._quantization import measurements as quantization
from benchmarks._gpu._states import measurements as states
from benchmarks._gpu._timing import Ceilings, Measurement, Slice, failures, once, rows
from benchmarks._gpu._updates import measurements as updates

SLICES: dict[str, Slice] = {
    "ema": ema,
    "norms": norms,
    "quantization": quantization,
    "updates": updates,
    "states": states,
    "contrastive": contrastive,
    "normalization": normalization,
    "newton_schulz": newton_schulz,
}

__all__ = ["SLICES", "Ceilings", "Measurement", "failures", "once", "rows"]
