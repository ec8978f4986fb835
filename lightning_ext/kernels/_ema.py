"""Exponential moving averages of lists of tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._ema import by_decay, check_decay, check_lists
from lightning_ext.functional._ema_checks import check_ema
from lightning_ext.functional._numbers import on_device
from lightning_ext.kernels._fused import use_triton


@torch.no_grad()
def ema_update_(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    values: Sequence[Tensor],
    decay: float | Tensor | Sequence[float | Tensor],
    *,
    fused: bool | None = None,
) -> None:
    r"""Move averages towards values in place.

    .. math:: \bar x \leftarrow \rho \bar x + (1 - \rho) x

    A decay of 1 leaves every bit of an average alone, one of 0 copies; another value of it compiles
    nothing anew. On a CPU, and with ``fused=False``, each average is what one
    ``torch._foreach_lerp_`` makes of it. No gradient is recorded.

    Args:
        averages: one tensor for each value, of its shape, in ``torch.promote_types(x.dtype,
            torch.float32)`` or wider; in float32 for the kernel. With several decays one such list
            for each; the kernel reads the values once for each four of them.
        values: floating point or complex tensors on one device; in float32, bfloat16 or float16,
            mixed as they come, for the kernel.
        decay: ρ in [0, 1]: a number, or a tensor of one entry, which is read without waiting where
            it is on the device of the values, and not checked there; in float64 ρ near 1 keeps its
            digits. A list or tuple for several averages of the same values.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Raises:
        ValueError: if the lists do not fit, or a decay is out of range.
        TypeError: if an average cannot hold the mean of its values, a value is an integer, or
            tensors are given otherwise than in lists.

    Example:
        >>> average = torch.zeros(2)
        >>> ema_update_([average], [torch.tensor([1.0, 2.0])], 0.75)
        >>> average
        tensor([0.2500, 0.5000])
    """
    check_lists(averages, values, decay)
    lists, decays = by_decay(averages, decay)
    if fused:
        check_ema(lists, values, launched=True)
    # On a CPU a look at one of them is enough, and cheap.
    if not (
        use_triton(fused, values[:1], op="ema_update_")
        and use_triton(fused, chain(values, *lists), op="ema_update_")
    ):
        functional.ema_update_(averages, values, decay)
        return
    if not fused:
        check_ema(lists, values, launched=True)
    decays = [check_decay(each, values) for each in decays]
    if any(isinstance(each, Tensor) for each in decays):
        decays = [on_device(each, values[0].device, torch.float64) for each in decays]
    from lightning_ext.kernels._triton import _ema

    _ema.ema_update_(lists, values, decays)
