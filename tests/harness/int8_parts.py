"""Small weights of 8 bits, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext.nn import Int8Linear, Int8Weight


def int8_weight(rows: int = 6, length: int = 300, **kwargs: Any) -> nn.Parameter:
    """A parameter in codes, of rows with a short last block."""
    return nn.Parameter(Int8Weight.of(torch.randn(rows, length), **kwargs))


def int8_layer(**kwargs: Any) -> Int8Linear:
    """A layer with such a weight."""
    return Int8Linear(300, 6, **kwargs)


def parts_of(of: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a weight is made of."""
    return of.codes, of.scales, of.shifts


def same_codes(one: Any, other: Any) -> bool:
    """Whether two weights agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(parts_of(one), parts_of(other), strict=True))
