"""The errors that one unit's reductions keep from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ext import kernels
from lightning_ext.functional import Quantized, error_feedback

FORMATS = ("float32", "int8")
_BLOCK_SIZE = 256


class ErrorFeedback:
    """Adds to what a hop sends what rounding withheld from it before.

    Args:
        beta: weight of the old error, as in ``functional.error_feedback``.
        format: of the errors in memory, "float32" or "int8" in blocks of 256.

    Raises:
        ValueError: if β is outside of [0, 1), or for another format.
    """

    def __init__(self, *, beta: float, format: str) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"error_beta={beta} is not allowed; it is in [0, 1)")
        if format not in FORMATS:
            raise ValueError(
                f"error_format={format!r} is not allowed; it is 'float32', or 'int8' for a "
                "quarter of the bytes"
            )
        self.beta = beta
        self.format = format
        self._errors: dict[int, Tensor | Quantized] = {}

    def encode(self, hop: int, rows: Tensor, encoded: Callable[[Tensor], Quantized]) -> Quantized:
        """Return the codes of rows and their error, and keep the next one.

        Args:
            hop: whose errors these are.
            rows: what is to be sent, shape (destinations, chunk).
            encoded: returns the codes that are sent.
        """
        error = self._read(hop, rows)
        wanted = rows + error
        sent = encoded(wanted)
        self._keep(hop, error_feedback(error, wanted, kernels.dequantize(sent), beta=self.beta))
        return sent

    def reset(self) -> None:
        """Forget all errors."""
        self._errors.clear()

    def state(self) -> list[dict[str, Any]]:
        """Return the errors of hops in order, as plain values."""
        return [_plain(error) for _, error in sorted(self._errors.items())]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Take errors over.

        Args:
            state: of ``state``, in the same format.
        """
        self._errors = {hop: _held(error) for hop, error in enumerate(state)}

    def _read(self, hop: int, rows: Tensor) -> Tensor:
        found = self._errors.get(hop)
        if found is None or found.shape != rows.shape:  # of another layout: no rank can use it
            return torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        if isinstance(found, Tensor):
            return found.to(rows.device)
        codes, scales = found.codes.to(rows.device), found.scales.to(rows.device)
        return kernels.dequantize(found._replace(codes=codes, scales=scales))

    def _keep(self, hop: int, error: Tensor) -> None:
        error = error.to(torch.float32)
        if self.format == "int8":
            self._errors[hop] = kernels.quantize(error, "int8", block_size=_BLOCK_SIZE)
        else:
            self._errors[hop] = error


def _plain(error: Tensor | Quantized) -> dict[str, Any]:
    if isinstance(error, Tensor):
        return {"error": error}
    return {"codes": error.codes, "scales": error.scales, "length": error.length}


def _held(plain: dict[str, Any]) -> Tensor | Quantized:
    # On the CPU, until the stream that reduces reads it: memory of the stream at hand would go back
    # to that stream's pool while the other one may still read it.
    kept = {name: x.to("cpu", copy=True) for name, x in plain.items() if isinstance(x, Tensor)}
    if "error" in kept:
        return kept["error"]
    codes, scales = kept["codes"], kept["scales"]
    return Quantized(codes, scales, None, "int8", _BLOCK_SIZE, plain["length"])
