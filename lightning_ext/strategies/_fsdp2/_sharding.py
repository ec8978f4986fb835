"""Shards a module unit by unit, and says what its units are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_ext._lightning import reshard
from lightning_ext.scaling import padded_parameters
from lightning_ext.strategies._fsdp2._announce import announce
from lightning_ext.strategies._fsdp2._plain import scalars
from lightning_ext.strategies._fsdp2._prepare import Preparation
from lightning_ext.strategies._fsdp2._secondary import share_secondary_mesh
from lightning_ext.strategies._fsdp2._units import Wrap, find_roots, find_units


def shard(
    module: LightningModule,
    wrap: Wrap,
    reshard_after_forward: bool | int,
    device: torch.device,
    options: dict[str, Any],
) -> None:
    """Shards what the user did not.

    Args:
        module: All of it, on any device or on the meta device.
        wrap: Which modules are units by themselves.
        reshard_after_forward: Of these; the root stays gathered from its forward to its backward.
        device: Where parameters are to be.
        options: Further ones of ``fully_shard``.
    """
    for one in outermost_sharded(module):
        _materialize_distributed_module(one, device)  # type: ignore[arg-type]  # a Module, too
    if isinstance(module, FSDPModule):
        return
    preparation = Preparation(module, device)
    units = find_units(module, wrap)
    announce(module, units, wrap, options["mesh"].size(-1))
    for part, is_complete in _walk(module, set()):
        if not is_complete:
            preparation.prepare(part)
        elif any(part is unit for unit in units):
            _fully_shard(part, reshard_after_forward=reshard_after_forward, **options)
            share_secondary_mesh(sharded_modules(module).values())
    # What stays gathered does not learn that an optimizer was toggled, as by manual optimization.
    keeps = module.automatic_optimization
    for root in find_roots(module):
        _fully_shard(root, reshard_after_forward=not keeps, **options)


def settle(module: nn.Module) -> None:
    """Has FSDP2 take the outermost modules for its roots, whichever is called first.

    Private: ``_lazy_init`` of the state of torch's ``FSDPModule``, which the first call does else.

    Args:
        module: With everything sharded.
    """
    for one in outermost_sharded(module):
        state: Any = one._get_fsdp_state()
        state._lazy_init()
    reshard(module)


def sharded_modules(module: nn.Module) -> dict[str, FSDPModule]:
    """Modules of FSDP2 by name."""
    return {name: one for name, one in module.named_modules() if isinstance(one, FSDPModule)}


def unit_sizes(module: nn.Module, shard_size: int) -> dict[str, int]:
    """Parameters of each unit, as collectives carry them: rows filled up to a multiple of ranks.

    Args:
        module: A sharded one.
        shard_size: Ranks over which it is.
    """
    units = sharded_modules(module)
    own = {name: _own_parameters(unit, units) for name, unit in units.items()}
    return {
        name: padded_parameters([p.shape for p in found], shard_size)
        for name, found in own.items()
        if found
    }


def _walk(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[nn.Module, bool]]:
    """Each module that is not sharded, before those below it, and again after them."""
    if module in seen or isinstance(module, FSDPModule):
        return
    seen.add(module)
    yield module, False
    for child in module.children():
        yield from _walk(child, seen)
    yield module, True


def _fully_shard(module: nn.Module, **options: Any) -> None:
    ignored = scalars(module)
    kinds = {p.dtype for p in module.parameters() if p.requires_grad and p not in ignored}
    if len(kinds) > 1 and not any(isinstance(p, DTensor) for p in module.parameters()):
        raise MisconfigurationException(
            f"Trained parameters of {type(module).__name__} are of {', '.join(map(str, kinds))};"
            " FSDP2 reduces a unit in one dtype. Hint: convert them, or make the part of another"
            " dtype a unit by `wrap`."
        )
    fully_shard(module, ignored_params=ignored, **options)


def outermost_sharded(module: nn.Module) -> list[FSDPModule]:
    """Modules of FSDP2 that are in no other one."""
    if isinstance(module, FSDPModule):
        return [module]
    return [one for child in module.children() for one in outermost_sharded(child)]


def _own_parameters(unit: Any, units: dict[str, FSDPModule]) -> list[nn.Parameter]:
    inner = {id(one) for one in units.values() if one is not unit}

    def walk(module: nn.Module) -> list[nn.Parameter]:
        found = list(module.parameters(recurse=False))
        children = [child for child in module.children() if id(child) not in inner]
        return found + [p for child in children for p in walk(child)]

    return [p for p in dict.fromkeys(walk(unit)) if isinstance(p, DTensor)]
