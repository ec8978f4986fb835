"""Collectives on all units of a module, as FSDP2's setters take one unit each."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_ext.strategies._zeropp._extension_points import sharded_units
from lightning_ext.strategies._zeropp._quantized_all_gather import QuantizedAllGather
from lightning_ext.strategies._zeropp._quantized_reduce_scatter import QuantizedReduceScatter


def install_collectives(
    module: nn.Module,
    *,
    all_gather: QuantizedAllGather | None = None,
    reduce_scatter: Callable[[int], QuantizedReduceScatter] | None = None,
) -> dict[str, QuantizedReduceScatter]:
    """Set collectives on every unit of a module that ``fully_shard`` was applied to.

    Args:
        module: sharded, or with sharded modules in it.
        all_gather: one for all units; torch's own where ``None``.
        reduce_scatter: returns one for the unit with this number, in the order of
            ``named_modules``; torch's own where ``None``. Seeds are to differ by that number.

    Returns:
        The reductions by the names of the units; what they keep is to be saved.

    Raises:
        ValueError: if nothing in the module is sharded, or a unit has several groups of
            parameters, for which torch takes no collectives.
    """
    units = sharded_units(module)
    if not units:
        raise ValueError(
            f"{type(module).__name__} has no sharded module; call fully_shard on it first"
        )
    made: dict[str, QuantizedReduceScatter] = {}
    for number, (name, unit) in enumerate(units.items()):
        if all_gather is not None:
            unit.set_custom_all_gather(all_gather)
        if reduce_scatter is not None:
            made[name] = reduce_scatter(number)
            unit.set_custom_reduce_scatter(made[name])
    return made
