"""The precision in which statistics of gradients are taken."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Return x in ``torch.promote_types(x.dtype, torch.float32)``."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which products on the device of x are in the dtypes of their factors."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def widen_real(x: Tensor) -> Tensor:
    """Return the same, with a last dimension for real and imaginary part where x is complex."""
    wide = widen(x)
    return torch.view_as_real(wide) if wide.is_complex() else wide
