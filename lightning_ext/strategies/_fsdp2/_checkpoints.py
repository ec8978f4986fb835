"""Writes a checkpoint in parts, and reads one, whatever ranks have written it.

Differs: from Lightning's ``ModelParallelStrategy``, a checkpoint takes the place of another when it
    is whole; optimizers without a state, or with one for some parameters alone, are read; what does
    not fit is said in words.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load, save
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_ext._lightning import reshard
from lightning_ext.strategies._fsdp2._optimizer_states import (
    Layouts,
    Order,
    own_order,
    parameter_names,
    plain_name,
    take_named,
    take_whole,
)

_WEIGHTS = "state_dict"


class Target(NamedTuple):
    """What a checkpoint is read into.

    Args:
        module: Its ``strict_loading`` counts.
        own: What this rank has of weights and buffers, by name; it is written to.
        sizes: Of those of all ranks.
        put: Tells the module what was written.
        names: Of the parameters of this rank.
        optimizers: None, for an evaluation.
        orders: Names by optimizer and group, of all ranks.
    """

    module: LightningModule
    own: dict[str, Any]
    sizes: Mapping[str, torch.Size | None]
    put: Callable[[dict[str, Any]], object]
    names: Mapping[Tensor, str]
    optimizers: Sequence[Optimizer]
    orders: Sequence[Order]


def save_parts(path: Path, checkpoint: dict[str, Any], *, writes_whole: bool | None = None) -> None:
    """Writes a folder to which each rank adds its part; all ranks must call.

    Args:
        path: Of the folder, the same on all ranks. What is there is replaced in the end.
        checkpoint: As Lightning dumps it; weights and states are taken out.
        writes_whole: Whether this rank writes weights and buffers of which it holds all; ``None``:
            rank 0 does, as into one file.
    """
    unfinished, first = path.with_name(f"{path.name}.part"), dist.get_rank() == 0
    writes_whole = first if writes_whole is None else writes_whole
    weights = checkpoint.pop(_WEIGHTS).items()
    parts = {_WEIGHTS: {name: x for name, x in weights if writes_whole or isinstance(x, DTensor)}}
    states = checkpoint.pop("optimizer_states", [])
    parts |= {f"optimizer_{number}": one for number, one in enumerate(states)}
    if first:
        _remove(unfinished)
        unfinished.mkdir(parents=True)
    dist.barrier()
    save(parts, checkpoint_id=unfinished)
    if first:
        torch.save(checkpoint, unfinished / _METADATA_FILENAME)
        _remove(path)
        unfinished.rename(path)
    dist.barrier()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, module: LightningModule, optimizers: Sequence[Optimizer], weights_only: bool | None
) -> dict[str, Any]:
    """Reads weights and states; all ranks must call.

    Args:
        path: A folder to which each rank wrote its part, or one file of whole weights and states.
        module: A sharded one; its ``strict_loading`` counts.
        optimizers: None, for an evaluation.
        weights_only: As in ``torch.load``.

    Returns:
        What else is in it.

    Raises:
        ValueError: There is no checkpoint.
        KeyError: It has no states of optimizers, and they are asked for.
        MisconfigurationException: Its names or shapes are not the module's.
    """
    reshard(module)
    return read_checkpoint(path, _sharded(module, optimizers), weights_only)


def read_checkpoint(path: Path, target: Target, weights_only: bool | None) -> dict[str, Any]:
    """Reads what this rank has of weights and states; all ranks must call.

    Args:
        path: A folder to which each rank wrote its part, or one file of whole weights and states.
        target: Of this rank.
        weights_only: As in ``torch.load``.

    Returns:
        What else is in it.

    Raises:
        ValueError: There is no checkpoint.
        KeyError: It has no states of optimizers, and they are asked for.
        MisconfigurationException: Its names or shapes are not the module's.
    """
    if (path / _METADATA_FILENAME).is_file():
        _load_parts(path, target)
        rest: dict[str, Any] = torch.load(path / _METADATA_FILENAME, weights_only=weights_only)
        return rest
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} is no checkpoint: neither one file, nor a folder with the file"
            f" {_METADATA_FILENAME!r} in it"
        )
    found: dict[str, Any] = torch.load(
        path, mmap=True, map_location="cpu", weights_only=weights_only
    )
    _load_whole(found.pop(_WEIGHTS), target, found.get("optimizer_states", ()))
    return found


def _sharded(module: LightningModule, optimizers: Sequence[Optimizer]) -> Target:
    own, names = get_model_state_dict(module), parameter_names(module)
    sizes = {name: getattr(value, "shape", None) for name, value in own.items()}
    options = StateDictOptions(strict=False)
    put = partial(set_model_state_dict, module, options=options)
    orders = [own_order(one, names) for one in optimizers]
    return Target(module, own, sizes, put, names, optimizers, orders)


def _load_parts(path: Path, target: Target) -> None:
    metadata = FileSystemReader(path).read_metadata()
    places, optimizers = _places(metadata).values(), target.optimizers
    _require_states(len({where[0] for where in places} - {_WEIGHTS}), optimizers)
    flat = {flat: where for flat, where in _places(metadata).items() if where[0] == _WEIGHTS}
    present = _matching(target, {where[1]: _size(metadata, name) for name, where in flat.items()})
    for number, (optimizer, order) in enumerate(zip(optimizers, target.orders, strict=True)):
        saved = _read_state(path, metadata, f"optimizer_{number}", optimizer, target.names)
        take_named(optimizer, target.names, saved, order)
    load({_WEIGHTS: present}, checkpoint_id=path)
    target.put(present)


def _load_whole(
    weights: Mapping[str, Any], target: Target, states: Sequence[dict[str, Any]]
) -> None:
    _require_states(len(states), target.optimizers)
    weights = {plain_name(name): value for name, value in weights.items()}
    sizes = {name: getattr(value, "shape", None) for name, value in weights.items()}
    present = _matching(target, sizes)
    for optimizer, order, saved in zip(target.optimizers, target.orders, states, strict=False):
        take_whole(optimizer, target.names, saved, order)
    with torch.no_grad():
        for name, own in present.items():
            if isinstance(own, Tensor):
                own.copy_(_cut(weights[name], own))
            else:
                present[name] = weights[name]
    target.put(present)


def _cut(whole: Tensor, own: Tensor) -> Tensor:
    whole = whole.to(device=own.device, dtype=own.dtype)
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def _read_state(
    path: Path,
    metadata: Metadata,
    key: str,
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
) -> dict[str, Any]:
    """The state of one optimizer, by names, each rank its parts."""
    owners = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    every = {flat: where[1:] for flat, where in _places(metadata).items() if where[0] == key}
    places = {flat: where for flat, where in every.items() if not _is_foreign(where, owners)}
    saved = {
        name: entry
        for name in places
        if isinstance(entry := metadata.state_dict_metadata[name], TensorStorageMetadata)
    }
    tensors = {
        name: (owners[places[name][1]], places[name][-1], entry.size, entry.properties.dtype)
        for name, entry in saved.items()
        if places[name][1] in owners
    }
    layouts = Layouts(optimizer, [(owner, size) for owner, _, size, _ in tensors.values()])
    flat: dict[str, Any] = dict.fromkeys(places)
    for name, entry in saved.items():  # a group's setting may be a tensor, too
        flat[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    flat |= {name: layouts.empty(*one) for name, one in tensors.items()}
    load(flat, checkpoint_id=path)
    return {"state": {}, **unflatten_state_dict(flat, places)}


def _is_foreign(where: tuple[Any, ...], owners: Collection[str]) -> bool:
    """Whether an entry is of the state of a parameter that is not here."""
    return where[0] == "state" and len(where) > 1 and where[1] not in owners


def _places(metadata: Metadata) -> dict[str, tuple[Any, ...]]:
    """Where each entry stood in the nested state that was saved."""
    places: dict[str, tuple[Any, ...]] = metadata.planner_data
    return places


def _size(metadata: Metadata, name: str) -> torch.Size | None:
    entry = metadata.state_dict_metadata[name]
    return entry.size if isinstance(entry, TensorStorageMetadata) else None


def _require_states(count: int, optimizers: Collection[Optimizer]) -> None:
    if count < len(optimizers):
        raise KeyError(
            f"the checkpoint has states of {count} optimizers, and there are {len(optimizers)}."
            " Hint: was it saved with save_weights_only=True? Its weights alone are read by"
            " load_from_checkpoint, from one file."
        )


def _matching(target: Target, saved: Mapping[str, torch.Size | None]) -> dict[str, Any]:
    """What of this rank's is saved, in the same shape."""
    module, sizes = target.module, target.sizes
    reshaped = [
        f"{name} {tuple(saved[name] or ())} and not {tuple(sizes[name] or ())}"
        for name in sizes.keys() & saved.keys()
        if saved[name] != sizes[name]
    ]
    missing, unknown = sorted(sizes.keys() - saved.keys()), sorted(saved.keys() - sizes.keys())
    if reshaped or (module.strict_loading and (missing or unknown)):
        parts = {"lacks": missing, "has besides": unknown, "has in other shapes": sorted(reshaped)}
        told = [f"{what} {', '.join(found[:5])}" for what, found in parts.items() if found]
        name = type(module).__name__.removeprefix("FSDP")
        raise MisconfigurationException(
            f"The checkpoint is not of this {name}: it {'; '.join(told)}. Hint:"
            " build the module as it was; with strict_loading=False names may differ, not shapes."
        )
    return {name: value for name, value in target.own.items() if name in saved}
