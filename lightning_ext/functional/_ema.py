"""Exponential moving averages of lists of tensors, several of them in one pass.

Source: Polyak & Juditsky 1992 averaging with exponential weights, as Busbridge et al. 2023
    (arXiv:2307.13813, equation 1) write it.
Differs: a decay of 0 copies and one of 1 leaves every bit alone, where a + (1 − ρ)(x − a) turns
    infinities into nan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from lightning_ext.functional._ema_checks import check_ema

_RUN = 2**16  # entries


def ema_update_(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    values: Sequence[Tensor],
    decay: float | Tensor | Sequence[float | Tensor],
) -> None:
    r"""Move averages towards values in place.

    .. math:: \bar x \leftarrow \rho \bar x + (1 - \rho) x

    A decay of 1 leaves every bit of an average alone, one of 0 copies. Gradients are recorded as by
    torch's own in-place operations, so wrap it in ``torch.no_grad()`` for parameters.

    Args:
        averages: one tensor for each value, of its shape, in ``torch.promote_types(x.dtype,
            torch.float32)`` or wider: what is added is of the order of (1 − ρ) x, which an average
            in half precision rounds away. With several decays one such list for each.
        values: floating point or complex tensors on one device.
        decay: ρ in [0, 1]: a number, or a tensor of one entry, which is read without waiting where
            it is on the device of the values, and not checked there. A list or tuple for several
            averages of the same values.

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
    values = list(values)
    known = check_ema(lists, values)
    decays = [check_decay(each, values) for each in decays]
    decays = [check_decay(float(each), values) if _is_at_hand(each) else each for each in decays]
    if known.alike and values:
        # Where no gradient is recorded, a twelfth of the time of many small tensors goes into
        # looking for one.
        quick = known.plain and not torch.is_grad_enabled()
        with torch.inference_mode() if quick else nullcontext():
            for each, rho in zip(lists, decays, strict=True):
                _update(each, values, rho)
        return
    for run in _runs(values):
        dtypes: list[torch.dtype] = []
        for each, rho in zip(lists, decays, strict=True):
            kept = each[run]
            if dtypes != [x.dtype for x in kept]:
                dtypes = [x.dtype for x in kept]
                wide = [x.to(dtype) for x, dtype in zip(values[run], dtypes, strict=True)]
            _update(kept, wide, rho)


def by_decay(
    averages: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    decay: float | Tensor | Sequence[float | Tensor],
) -> tuple[list[list[Tensor]], list[float | Tensor]]:
    """Return one list of averages for each decay.

    Raises:
        ValueError: if there are more of one than of the other.
    """
    if not isinstance(decay, (list, tuple)):
        return [list(cast(Sequence[Tensor], averages))], [cast(float | Tensor, decay)]
    if len(averages) != len(decay) or any(isinstance(each, Tensor) for each in averages):
        raise ValueError(
            f"{len(decay)} decays need as many lists of averages, one average for each value"
        )
    return [list(each) for each in averages], list(decay)


def check_lists(averages: object, values: object, decay: object) -> None:
    """Refuse what does not have an order.

    Raises:
        TypeError: if averages, those of one decay, or values are no sequence of tensors.
    """
    several = isinstance(decay, (list, tuple)) and isinstance(averages, Sequence)
    each = (
        [x for x in cast(Sequence[object], averages) if not isinstance(x, Tensor)]
        if several
        else []
    )
    for name, given in (
        ("averages", averages),
        ("values", values),
        *(("averages", x) for x in each),
    ):
        if not isinstance(given, Sequence):
            raise TypeError(
                f"{name} are a {type(given).__name__}; give a list of tensors, with several decays "
                "one list of averages for each. Of a dict, list(d.values())"
            )


def check_decay(decay: float | Tensor, values: Sequence[Tensor]) -> float | Tensor:
    """Return a decay as a number, or as a tensor without dimensions on the device of the values.

    Raises:
        ValueError: if a number is out of range, or a tensor has several or is on another device.
    """
    if isinstance(decay, Tensor):
        if decay.numel() != 1:
            raise ValueError(f"decay has shape {tuple(decay.shape)}; give one number or a list")
        if not values or decay.device == values[0].device:
            return decay.reshape(())
        if decay.device.type != "cpu":
            raise ValueError(f"decay is on {decay.device}, the values on {values[0].device}")
        decay = decay.item()
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} is not allowed; it must lie in [0, 1]")
    return decay


def _is_at_hand(decay: float | Tensor) -> bool:
    """Whether it is a tensor that can be read without waiting and without loss."""
    return (
        isinstance(decay, Tensor)
        and decay.device.type == "cpu"
        and not decay.requires_grad
        and not torch.compiler.is_compiling()
    )


def _runs(values: list[Tensor]) -> Iterator[slice]:
    """Consecutive values of few entries, or one: what is there in its wide form at a time."""
    start, entries = 0, 0
    for i, value in enumerate(values):
        if entries + value.numel() > _RUN and i > start:
            yield slice(start, i)
            start, entries = i, 0
        entries += value.numel()
    if values:
        yield slice(start, len(values))


def _update(averages: list[Tensor], values: list[Tensor], decay: float | Tensor) -> None:
    if isinstance(decay, Tensor):
        for average, value in zip(averages, values, strict=True):
            old = average.clone() if torch.is_grad_enabled() else average  # for the gradient of ρ
            moved = old.lerp(value, (1 - decay).to(average.dtype))
            moved = torch.where(decay == 0, value, moved)
            average.copy_(torch.where(decay == 1, old, moved))
    elif decay == 0:
        torch._foreach_copy_(averages, values)
    elif decay < 1:
        torch._foreach_lerp_(averages, values, 1 - decay)
