"""States in checkpoints: what an owner keeps of a subspace lies there on all ranks, along rows.

What is in codes has its format in its name, ``exp_avg.int8`` and ``exp_avg.int8_scales``.

Differs: torch rounds what it loads to the dtype of the parameter; these come back as they were, or
    in the format that the optimizer has now.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_ext.optim._low_bit._saved import flat_state, loaded_moment, saved_moment
from lightning_ext.optim._low_rank._formats import in_own_formats
from lightning_ext.optim._low_rank._others import OTHER_MOMENTS, UPDATES
from lightning_ext.optim._low_rank._owners import is_mine, process_group
from lightning_ext.optim._low_rank._states import COUNTS, FORMATTED, Layout, Turn, new_state
from lightning_ext.optim._low_rank._weights import LENGTHS
from lightning_ext.optim._matrix._owners import rows_of

OWN = ("state_dtype", "projection_dtype")  # how states are kept is the optimizer's
_ON_ALL = ("step", "updates", *LENGTHS)


class Matrix(NamedTuple):
    """A parameter with a subspace.

    Attributes:
        param: the parameter.
        layout: of its states.
        turn: its place among others.
        owner: the rank that keeps its subspace; ``None`` where all do.
    """

    param: Tensor
    layout: Layout
    turn: Turn
    owner: int | None


def refuse_another(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the state of another optimizer, whose moments are not of the same numbers.

    Args:
        optimizer: which is to load it.
        state_dict: the state.

    Raises:
        ValueError: if it is that.
    """
    own = optimizer.defaults["method"]
    for group in state_dict["param_groups"]:
        if group.get("method") != own:
            raise ValueError(
                f"{own} got the state of {group.get('method', 'another optimizer')}, whose moments"
                f" are of other numbers; it must be one of {own}. Hint: load the weights alone, and"
                " start with new states"
            )


def saved_states(
    optimizer: Optimizer, found: dict[str, Any], some: Mapping[Tensor, Matrix]
) -> dict[str, Any]:
    """Return a state for checkpoints; all ranks must call where parameters are split.

    Args:
        optimizer: whose state it is.
        found: what torch makes of it.
        some: its matrices with a subspace.

    Returns:
        The same, with what owners keep as DTensors split along dimension 0 over the mesh of the
        parameter, and their numbers on all ranks.
    """
    states = dict(found["state"])
    for index, param in _by_id(found, optimizer).items():
        if index not in states:
            continue
        if param not in some:
            parts = [saved_moment(name, x, param) for name, x in states[index].items()]
            states[index] = {name: x for part in parts for name, x in part.items()}
        elif process_group(param) is not None:
            states[index] = _shared(states[index], some[param])
    return {**found, "state": states}


def take_states(
    optimizer: Optimizer, state_dict: dict[str, Any], some: Mapping[Tensor, Matrix]
) -> None:
    """Put states back as they were saved.

    Args:
        optimizer: which has just loaded.
        state_dict: what it loaded.
        some: its matrices with a subspace.
    """
    groups = {x: group for group in optimizer.param_groups for x in group["params"]}
    for index, param in _by_id(state_dict, optimizer).items():
        saved = flat_state(state_dict["state"].get(index, {}), dict.fromkeys(FORMATTED))
        if param in some and "refreshes" in saved:
            optimizer.state[param] = _kept(saved, some[param])
        elif saved:
            optimizer.state[param] = _others(saved, param, groups[param])


def _by_id(state_dict: dict[str, Any], optimizer: Optimizer) -> dict[Any, Tensor]:
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return dict(zip(saved, params, strict=True))


def _shared(state: dict[str, Tensor], matrix: Matrix) -> dict[str, Tensor]:
    """What all ranks save of a matrix."""
    param, layout = matrix.param, matrix.layout
    found = {name: x for name, x in state.items() if name in _ON_ALL}
    mine = is_mine(param, matrix.owner)
    on_host = layout._replace(device=torch.device("cpu"))
    shapes = state if mine else {**state, **new_state(on_host)}
    for name in sorted(shapes.keys() - found.keys()):
        like = shapes[name].to(layout.device) if mine else shapes[name]
        if like.dim():
            found[name] = _scattered(like, matrix)
            continue
        number = like.clone() if mine else torch.empty_like(like, device=layout.device)
        dist.broadcast(number, group=process_group(param), group_src=matrix.owner)
        found[name] = number.to("cpu" if name in COUNTS else layout.device)
    return found


def _scattered(like: Tensor, matrix: Matrix) -> Tensor:
    """Rows of what the owner keeps; of what others give only the shape and dtype count."""
    param, device = matrix.param, matrix.layout.device
    group = process_group(param)
    assert isinstance(param, DTensor)
    heights = rows_of(len(like), dist.get_world_size(group))
    part = torch.empty(heights[0], *like.shape[1:], dtype=like.dtype, device=device)
    parts = None
    if is_mine(param, matrix.owner):
        padded = like.new_zeros(heights[0] * len(heights), *like.shape[1:])
        padded[: len(like)] = like  # scatter takes parts of one size
        parts = list(padded.split(heights[0]))
    dist.scatter(part, parts, group=group, group_src=matrix.owner)
    return DTensor.from_local(
        part[: heights[dist.get_rank(group)]],
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _kept(saved: Mapping[str, Tensor], matrix: Matrix) -> dict[str, Tensor]:
    """What this rank keeps of a matrix's saved states."""
    param, found = matrix.param, {}
    split, mine = process_group(param) is not None, is_mine(matrix.param, matrix.owner)
    for name, value in saved.items():
        if isinstance(value, DTensor) and name not in LENGTHS:
            value = value.full_tensor()
        if not split or mine or name in (*_ON_ALL, *COUNTS):
            found[name] = _placed(name, value.detach(), param)
    return in_own_formats(found, matrix.layout) if not split or mine else found


def _others(saved: Mapping[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter of AdamW."""
    found: dict[str, Any] = {"step": saved["step"].to(param.device, copy=True)}
    if UPDATES in saved:
        found[UPDATES] = saved[UPDATES].to("cpu", copy=True)
    for name, make in OTHER_MOMENTS.items():
        found[name] = loaded_moment(name, saved, param, group, signed=make.signed)
    return found


def _placed(name: str, value: Tensor, param: Tensor) -> Tensor:
    if name in LENGTHS and isinstance(param, DTensor):
        if isinstance(value, DTensor):
            return value.clone()
        return distribute_tensor(
            value.to(param.device), param.device_mesh, param.placements, src_data_rank=None
        )
    return value.to("cpu" if name in COUNTS else param.device, copy=True)
