"""What an update of lists asks before it launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional import QuantizedState
from lightning_ext.functional._numbers import on_device
from lightning_ext.functional._updates._checks import Lists, Options, check_lists
from lightning_ext.functional._updates._entries import check_columns, check_entries
from lightning_ext.kernels._fused import takes_codes, use_triton


def wants_launch(
    op: str,
    fused: bool | None,
    lists: Lists,
    steps: Sequence[Tensor] | None,
    others: Sequence[Tensor] = (),
) -> bool:
    """Return whether kernels do the update.

    Args:
        op: the operation's name.
        fused: as in ``use_triton``.
        lists: parameters, gradients and states by name.
        steps: counts of steps; those on the CPU are brought to the others.
        others: tensors of other shapes.

    Raises:
        TypeError: if there is something else than lists of tensors.
    """
    given = lists if steps is None else lists | {"steps": steps}
    check_columns(op, given)
    # On a CPU a look at one of them is enough, and cheap.
    first = list(lists["params"][:1])
    if fused is False or (fused is None and not all(isinstance(x, Tensor) for x in first)):
        return False
    if fused is None and not use_triton(None, first, op=op):
        return False
    check_entries(op, given)
    on_cpu = not first or first[0].is_cpu
    counts = [x for x in steps or () if on_cpu or not x.is_cpu]
    return takes_codes(fused, [*_tensors(lists), *counts, *others], op=op)


def for_launch(
    op: str,
    lists: Lists,
    steps: Sequence[Tensor] | None,
    options: Options,
    lr: Tensor | float,
    *,
    several_formats: bool = False,
) -> tuple[Any, Options, Any]:
    """Refuse what a launch does not take; return rate, options and counts where it reads them.

    Args:
        op: the operation's name.
        lists: parameters, gradients and states by name.
        steps: counts of steps.
        options: of the call.
        lr: a number, or a tensor of one entry.
        several_formats: whether a list of states may have them.

    Raises:
        ValueError: if lists do not fit together, a list has states of several formats, or a number
            is on another device.
        TypeError: for dtypes that have no update.
    """
    rate, checked, _ = check_lists(op, lists, steps, options, lr)
    for name, column in () if several_formats else lists.items():
        formats = {x.format if isinstance(x, QuantizedState) else "tensor" for x in column}
        if len(formats) > 1:
            raise ValueError(
                f"{op}(fused=True) got {name} in the formats {', '.join(sorted(formats))}; make a "
                "call for each"
            )
    params = lists["params"]
    device = params[0].device if params else torch.device("cpu")
    names = ("grad_scale", "found_inf", "clip")
    there: dict[str, Any] = {name: _there(getattr(checked, name), device) for name in names}
    rate = _there(rate, device) if isinstance(rate, Tensor) else float(rate)
    return rate, checked._replace(**there), _counts(steps, device)


def _tensors(lists: Lists) -> Iterator[Tensor]:
    for column in lists.values():
        for x in column:
            yield from (x.codes, x.scales) if isinstance(x, QuantizedState) else (x,)


def _there(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else on_device(value, device, torch.float32).to(torch.float32)


def _counts(steps: Sequence[Tensor] | None, device: torch.device) -> Sequence[Tensor] | None:
    """Counts on a device; those on the CPU go there in one copy, which nothing waits for."""
    places = [i for i, x in enumerate(steps or ()) if x.is_cpu]
    if steps is None or device.type == "cpu" or not places:
        return steps
    # Of four numbers each the addresses are multiples of 16 bytes, as those of other columns.
    rows = torch.zeros(len(places), 4)
    rows[:, 0] = torch.stack([steps[i].reshape(()) for i in places])
    found = list(steps)
    for i, row in zip(places, rows.to(device, non_blocking=True), strict=True):
        found[i] = row[0]
    return found
