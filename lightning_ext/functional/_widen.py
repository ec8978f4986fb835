"""The precision in which statistics of gradients are taken."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return x in ``torch.promote_types(x.dtype, torch.float32)``."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widen_real(x: Tensor) -> Tensor:
    """Return the same, with a last dimension for real and imaginary part where x is complex."""
    wide = widen(x)
    return torch.view_as_real(wide) if wide.is_complex() else wide
