"""Moments in the format that a group asks for.

Source: Li et al. 2023 (arXiv:2309.01507), section 5 and its code, and Dettmers et al. 2022
    (arXiv:2110.02861), for what stays in float32: vectors, and tensors of at most 4096 entries.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ext.functional import QuantizedState, encode_state, zero_state
from lightning_ext.optim._low_bit._bitsandbytes import page_state
from lightning_ext.optim._step._shards import check_rows_whole, local_part, reduction

Moment = Tensor | QuantizedState
StateDtype = Literal["float32", "bfloat16", "int8", "int4", "fp8"]
Backend = Literal["bitsandbytes"] | None
WeightRounding = Literal["nearest", "stochastic", "compensated"]

STATE_DTYPES = (None, "float32", "bfloat16", "int8", "int4", "fp8")
WEIGHT_ROUNDINGS = ("nearest", "stochastic", "compensated")
MIN_QUANTIZED_NUMEL = 4096
WEIGHT_ERROR = "weight_error"


class MomentOf(NamedTuple):
    """Makes a moment of a parameter, all zeros.

    Attributes:
        signed: whether it may be negative.
    """

    signed: bool

    def __call__(self, param: Tensor, group: dict[str, Any]) -> Moment:
        """Return zeros in the format that the group asks for.

        Args:
            param: the parameter.
            group: its ``state_dtype`` is the format, ``None`` for a tensor as the parameter is.

        Raises:
            ValueError: if a format in blocks is asked for, and the parameter's rows are cut.
        """
        format = moment_format(param, group, signed=self.signed)
        if format is None:
            return torch.zeros_like(param, memory_format=torch.preserve_format)
        wide = torch.promote_types(param.dtype, torch.float32)
        if format == "float32":
            return torch.zeros_like(param, memory_format=torch.preserve_format, dtype=wide)
        if format != "bfloat16":
            check_rows_whole(f"state_dtype={format!r}", [param])
        local = local_part(param)
        state = zero_state(local.shape, format, signed=self.signed, device=local.device, dtype=wide)
        return page_state(state) if group.get("paged") else state


first_moment = MomentOf(signed=True)
second_moment = MomentOf(signed=False)


def moment_format(param: Tensor, group: dict[str, Any], *, signed: bool) -> str | None:
    """Return the format of a moment, the same on all ranks.

    Vectors and small tensors stay in float32, and so do second moments in "int4" of what has one
    row or one column.

    Args:
        param: the parameter.
        group: with ``state_dtype``, and the entries up to which ``min_quantized_numel`` a tensor is
            small, 4096 where it does not say.
        signed: whether the moment may be negative.
    """
    format: str | None = group.get("state_dtype")
    if format in (None, "float32"):
        return format
    least = group.get("min_quantized_numel", MIN_QUANTIZED_NUMEL)
    if param.dim() < 2 or param.numel() <= least:
        return "float32"
    flat = param.shape[0] == 1 or param.numel() == param.shape[0]
    return "float32" if format == "int4" and not signed and flat else format


def moment_from(part: Tensor, param: Tensor, group: dict[str, Any], *, signed: bool) -> Moment:
    """Return a moment in the format that the group asks for, in memory of its own.

    Args:
        part: its numbers, what this rank holds of them.
        param: the parameter.
        group: of the parameter.
        signed: whether it may be negative.
    """
    found = MomentOf(signed)(param, group)
    if isinstance(found, Tensor):
        local_part(found).copy_(part)
        return found
    found = with_reduction(found, param)
    wide = part.to(found.scales.dtype)
    if found.format == "bfloat16":
        found.codes.copy_(wide)  # to nearest: what was bfloat16 stays as it is
    else:
        encode_state(wide, found.format, signed=signed, out=found)
    return found._replace(reduce=None)


def with_reduction(moment: Any, param: Tensor) -> Any:
    """Return a moment that knows how maxima of columns are taken over the ranks of its parameter.

    Args:
        moment: of the parameter.
        param: as the optimizer holds it.
    """
    if not isinstance(moment, QuantizedState) or moment.signed or moment.format != "int4":
        return moment
    return moment._replace(reduce=reduction([param], op=dist.ReduceOp.MAX))


def kind_of(moment: Moment) -> str:
    """Return the name of what a moment is: its format, or the dtype of a tensor."""
    return moment.format if isinstance(moment, QuantizedState) else str(moment.dtype)
