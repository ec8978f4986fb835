"""What lists of averages and values must be, remembered while their tensors live."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, call, is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

_dtype_of = attrgetter("dtype")
_KEPT = 16  # lists that are remembered

# To look at 800 small tensors and their averages takes half the time of their update; to see that
# they are still the same objects, a twentieth.
_passed: dict[tuple[int, ...], _Passed] = {}


class Known(NamedTuple):
    """What an update can rely on.

    Args:
        alike: whether each average has the dtype of its value.
        plain: whether there are no tensors of other classes, and nothing is traced.
    """

    alike: bool
    plain: bool


class _Passed(NamedTuple):
    """Lists that passed.

    Args:
        tensors: the values and every list of averages.
        first: dtypes and devices of the first of each, which ``Module.to`` changes in place, and
            for a launch sizes and dtypes of all.
        known: what there is to say about them.
    """

    tensors: list[list[ref[Tensor]]]
    first: list[Any]
    known: Known


def check_ema(
    averages: Sequence[Sequence[Tensor]], values: Sequence[Tensor], *, launched: bool = False
) -> Known:
    """Return what an update of lists that fit can rely on.

    Args:
        averages: a list for each decay.
        values: one for each average.
        launched: whether their memory is taken by address: then it counts, too, that no tensor was
            given other data since it passed, which torch's own operations would notice.

    Raises:
        ValueError: if the lists have different lengths, or an average another shape or device.
        TypeError: if an average cannot hold the mean of its values.
    """
    for each in averages:
        if len(each) != len(values):
            raise ValueError(
                f"{len(each)} averages and {len(values)} values were given; give one average for "
                "each value, and with several decays one list of averages for each decay"
            )
    if not values or not averages:
        return Known(alike=True, plain=False)
    if torch.compiler.is_compiling():
        return Known(_look(averages, values), plain=False)
    lists = (values, *averages)
    name = (len(values), *[id(each[0]) for each in lists])
    first: list[Any] = [y for each in lists for y in (each[0].dtype, each[0].device)]
    if launched:
        first += [[*map(kind, each)] for each in lists for kind in (Tensor.numel, _dtype_of)]
    found = _passed.get(name)
    if found is None or found.first != first or not all(map(_same, found.tensors, lists)):
        plain = {type(x) for each in lists for x in each} <= {Tensor, Parameter}
        known = Known(_look(averages, values), plain)
        found = _passed[name] = _Passed([[*map(ref, each)] for each in lists], first, known)
        if len(_passed) > _KEPT:
            del _passed[next(iter(_passed))]
    return found.known


def _same(known: list[ref[Tensor]], tensors: Sequence[Tensor]) -> bool:
    return all(map(is_, map(call, known), tensors))


def _look(averages: Sequence[Sequence[Tensor]], values: Sequence[Tensor]) -> bool:
    shapes, dtypes = [x.shape for x in values], [x.dtype for x in values]
    devices = {x.device for x in values}
    if len(devices) > 1:
        raise ValueError("the values are on several devices; call it once for each device")
    alike = True
    for each in averages:
        if [x.shape for x in each] != shapes or {x.device for x in each} != devices:
            _refuse(each, values)
        kept = [x.dtype for x in each]
        alike &= kept == dtypes
        for average, value in dict.fromkeys(zip(kept, dtypes, strict=True)):
            _check_dtypes(average, value)
    return alike


def _refuse(averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for i, (average, value) in enumerate(zip(averages, values, strict=True)):
        if average.shape != value.shape or average.device != value.device:
            raise ValueError(
                f"average {i} has shape {tuple(average.shape)} on {average.device}, its value "
                f"{tuple(value.shape)} on {value.device}; they must agree"
            )


def _check_dtypes(average: torch.dtype, value: torch.dtype) -> None:
    if not (value.is_floating_point or value.is_complex):
        raise TypeError(f"a value is {value}; integers and booleans have no average: copy them")
    least = torch.promote_types(value, torch.float32)
    if torch.promote_types(average, least) != average:
        raise TypeError(
            f"an average is {average}, its value {value}; keep it in {least} or wider: steps of "
            "1 - decay would be rounded away"
        )
