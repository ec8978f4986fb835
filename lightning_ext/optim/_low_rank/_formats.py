"""Loaded states of a subspace in the formats that the optimizer has now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import QuantizedState
from lightning_ext.optim._low_bit._saved import saved_format
from lightning_ext.optim._low_rank._states import (
    FORMATTED,
    MOMENTS,
    Layout,
    State,
    basis_parts,
    moment_of,
    moment_parts,
    read_basis,
)


def in_own_formats(saved: State, layout: Layout) -> State:
    """Return states as a layout has them; what is in its formats stays as it is, bit for bit.

    Args:
        saved: of the matrix, whole.
        layout: of the matrix.

    Raises:
        ValueError: if one is there in several formats.
    """
    coded = {name: saved_format(name, saved) for name in FORMATTED}
    found = {k: x for k, x in saved.items() if k.split(".")[0] not in FORMATTED}
    for name, signed in MOMENTS.items():
        format = coded[name] or _plain_format(saved[name])
        old = moment_of(saved, layout._replace(state_dtype=format), name)
        own = layout.state_dtype or "float32"
        if format != own:
            old = _encoded(functional.decode_state(old), own, layout, signed=signed)
        found |= moment_parts(name, old)
    if layout.projection is not None:
        kept = {k: x for k, x in saved.items() if k.startswith("projection")}
        same = (coded["projection"] or "float32") == layout.projection
        found |= kept if same else basis_parts(read_basis(saved, layout), layout)
    return found


def _encoded(numbers: Tensor, format: str, layout: Layout, *, signed: bool) -> QuantizedState:
    how: dict[str, Any] = {"signed": signed, "device": numbers.device, "dtype": layout.dtype}
    found = functional.zero_state(layout.low, format, **how)
    if format in ("float32", "bfloat16"):
        found.codes.copy_(numbers)  # to nearest
        return found
    return functional.encode_state(numbers.to(layout.dtype), format, signed=signed, out=found)


def _plain_format(moment: Tensor) -> str:
    return "bfloat16" if moment.dtype == torch.bfloat16 else "float32"
