"""The one measure of accuracy: relative error against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_accurate(out: Tensor, truth: Tensor, *, torch_out: Tensor | None = None) -> None:
    """Assert ‖out − truth‖ / ‖truth‖ ≤ max(2 × torch's own error, floor of out's dtype).

    Args:
        out: Result under test; its dtype selects the floor.
        truth: The same quantity in float64, of the same shape. Where it is all zeros the error is
            absolute.
        torch_out: torch's own result in the dtype of `out`; one that is not finite excuses nothing.
    """
    if truth.dtype != torch.float64:
        raise TypeError(f"truth is {truth.dtype}; compute it in torch.float64")
    bound = FLOORS[out.dtype]
    if torch_out is not None:
        if torch_out.dtype != out.dtype:
            raise TypeError(f"torch_out is {torch_out.dtype}, out is {out.dtype}; they must agree")
        own_error = _relative_error(torch_out, truth)
        if math.isfinite(own_error):
            bound = max(bound, 2 * own_error)
    error = _relative_error(out, truth)
    # A NaN compares false, so it fails.
    assert error <= bound, f"relative error {error:.3g}, allowed {bound:.3g}"


def _relative_error(out: Tensor, truth: Tensor) -> float:
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    truth = truth.detach().cpu()
    difference = torch.linalg.vector_norm(out.detach().cpu().double() - truth).item()
    size = torch.linalg.vector_norm(truth).item()
    return difference / size if size > 0 else difference
