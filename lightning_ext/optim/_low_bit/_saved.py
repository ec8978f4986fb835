"""States of few bits in checkpoints: tensors that lie on the ranks as their parameter does.

A moment ``exp_avg`` in "int8" is saved as ``exp_avg.int8``, one code an entry, and
``exp_avg.int8_scales`` and ``exp_avg.int8_offsets``, a row of which goes with a row of the
parameter; see ``functional.state_to_rows``. What is no code is saved under its own name. The dot
is that of torch's flat states: it reads the parts of ``exp_avg`` as a dict of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ext.functional import (
    QuantizedState,
    decode_state,
    state_from_rows,
    state_to_rows,
)
from lightning_ext.optim._low_bit._bitsandbytes import page_state
from lightning_ext.optim._low_bit._moments import (
    WEIGHT_ERROR,
    Moment,
    MomentOf,
    moment_format,
    moment_from,
)
from lightning_ext.optim._step._shards import local_part, split_as

T = TypeVar("T", bound=Optimizer)
_CODED = ("int8", "int4", "fp8")
# How states are kept is the optimizer's, not the checkpoint's: a loaded state is converted.
_OWN = ("state_dtype", "min_quantized_numel", "weight_rounding", "backend", "paged")


def saves_moments(states: Mapping[str, Any]) -> Callable[[type[T]], type[T]]:
    """Return a decorator by which a class of optimizers saves and loads states of few bits.

    Args:
        states: by name what makes each of a parameter; only moments are looked at.
    """
    moments = {name: make for name, make in states.items() if isinstance(make, MomentOf)}

    def decorate(kind: type[T]) -> type[T]:
        save, load = kind.state_dict, kind.load_state_dict

        @wraps(save)
        def state_dict(self: T) -> dict[str, Any]:
            found = save(self)
            params = dict(_indexed(found, self))
            packed = {i: _saved(x, params.get(i)) for i, x in found["state"].items()}
            return {**found, "state": packed}

        @wraps(load)
        def load_state_dict(self: T, state_dict: dict[str, Any]) -> None:
            own = [{k: g[k] for k in _OWN if k in g} for g in self.param_groups]
            states = {i: flat_state(x, moments) for i, x in state_dict["state"].items()}
            state_dict = {**state_dict, "state": states}
            _refuse_others(self, state_dict, moments)
            plain = {i: _without_codes(x, moments) for i, x in states.items()}
            load(self, {**state_dict, "state": plain})
            for group, values in zip(self.param_groups, own, strict=True):
                group.update({k: v for k, v in self.defaults.items() if k not in group} | values)
            _take(self, state_dict, moments)

        vars_of: Any = kind
        vars_of.state_dict, vars_of.load_state_dict = state_dict, load_state_dict
        return kind

    return decorate


def saved_moment(name: str, moment: Moment, param: Tensor) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of a moment.

    Args:
        name: of the moment.
        moment: as the optimizer has it.
        param: whose it is.
    """
    if not isinstance(moment, QuantizedState):
        return {name: moment}
    if moment.format not in _CODED:
        return {name: _placed(moment.codes, param)}
    found, stem = state_to_rows(moment), f"{name}.{moment.format}"
    if "offsets" in found:
        found["offsets"] = found["offsets"].to(torch.uint8)  # below 256; gloo takes no int16
    columns = found.pop("column_scales", None)
    saved = {f"{stem}_{key}": _placed(x, param) for key, x in found.items() if key != "codes"}
    if columns is not None:
        saved[f"{stem}_column_scales"] = columns  # the same on all ranks
    return {stem: _placed(found["codes"], param), **saved}


def loaded_moment(
    name: str, saved: Mapping[str, Any], param: Tensor, group: dict[str, Any], *, signed: bool
) -> Moment | None:
    """Return a moment in the format that the group asks for, ``None`` where nothing is saved.

    Args:
        name: of the moment.
        saved: the entries of the parameter's state.
        param: whose it is.
        group: of the parameter.
        signed: whether it may be negative.

    Raises:
        ValueError: if it is there in several formats.
    """
    format = saved_format(name, saved)
    if format is None:
        value = saved.get(name)
        if not isinstance(value, Tensor):
            return None
        return moment_from(_part(value, param), param, group, signed=signed)
    stem = f"{name}.{format}"
    rows = {"codes": _part(saved[stem], param).clone()}
    for key in saved:
        if key.startswith(f"{stem}_"):
            whole = key.endswith("_column_scales")  # the same on all ranks
            found = saved[key].to(param.device) if whole else _part(saved[key], param)
            rows[key.removeprefix(f"{stem}_")] = found.clone()
    state = state_from_rows(rows, format, signed=signed)
    if format == moment_format(param, group, signed=signed):
        return page_state(state) if group.get("paged") else state
    return moment_from(decode_state(state), param, group, signed=signed)


def saved_format(name: str, saved: Mapping[str, Any]) -> str | None:
    """Return the format of codes that a moment is saved in, ``None`` where it is in none.

    Args:
        name: of the moment.
        saved: the entries of the parameter's state.

    Raises:
        ValueError: if it is there in several formats.
    """
    found = [format for format in _CODED if f"{name}.{format}" in saved]
    forms = [f"{name}.{x}" for x in found] + [name] * isinstance(saved.get(name), Tensor)
    if len(forms) > 1:
        raise ValueError(_several(name, forms))
    return found[0] if found else None


def _saved(state: dict[str, Any], param: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        coded = param is not None and isinstance(value, QuantizedState)
        found |= saved_moment(name, value, param) if coded else {name: value}
    return found


def flat_state(state: dict[str, Any], moments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state under the names that it was saved by.

    Torch makes a dict of what has a dot in its name, and an empty one of what is not there.

    Args:
        state: to be loaded.
        moments: by their names.
    """
    parts = {name: x for name, x in state.items() if isinstance(x, dict)}
    parts = {name: x for name, x in parts.items() if name in moments or not x}
    found = {f"{name}.{key}": x for name, one in parts.items() for key, x in one.items()}
    return {name: x for name, x in state.items() if name not in parts} | found


def _several(name: str, forms: list[str]) -> str:
    return (
        f"the state to be loaded has {name} as {', '.join(forms)}, of which one is of the"
        " checkpoint; torch adds the present one under full_state_dict=True. Hint: give the whole"
        " state to optimizer.load_state_dict on all ranks, or set the state_dtype that was saved"
    )


def _without_codes(state: dict[str, Any], moments: Mapping[str, MomentOf]) -> dict[str, Any]:
    """A state without what torch would round to the parameter's dtype."""
    return {k: v for k, v in state.items() if k != WEIGHT_ERROR and not _belongs(k, moments)}


def _belongs(key: str, moments: Mapping[str, MomentOf]) -> bool:
    stems = [f"{name}.{format}" for name in moments for format in _CODED]
    return key in moments or any(key == x or key.startswith(f"{x}_") for x in stems)


def _refuse_others(
    optimizer: Optimizer, state_dict: dict[str, Any], moments: Mapping[str, MomentOf]
) -> None:
    """Refuse the state of an optimizer that keeps something else."""
    if len(state_dict["param_groups"]) != len(optimizer.param_groups):
        return  # torch says so
    for i, param in _indexed(state_dict, optimizer):
        saved = state_dict["state"].get(i) or {}
        found = {name: _entry(name, saved) for name in moments}
        shapes = {name: tuple(x.shape) for name, x in found.items() if x is not None}
        lacks_squares = "exp_avg_sq" in moments and [*shapes] == ["exp_avg"]
        if saved and (not shapes or lacks_squares or {*shapes.values()} - {tuple(param.shape)}):
            there = [f"{name}{[*getattr(x, 'shape', ())]}" for name, x in sorted(saved.items())]
            raise ValueError(
                f"{type(optimizer).__name__} keeps {', '.join(moments)} in the shape of parameter"
                f" {i}, {tuple(param.shape)}; the state to be loaded has {', '.join(there)}. Hint:"
                " it is of another optimizer; load the weights alone, by load_from_checkpoint"
            )


def _entry(name: str, saved: Mapping[str, Any]) -> Tensor | None:
    format = saved_format(name, saved)
    value = saved.get(name if format is None else f"{name}.{format}")
    return value if isinstance(value, Tensor) else None


def _take(
    optimizer: Optimizer, state_dict: dict[str, Any], moments: Mapping[str, MomentOf]
) -> None:
    ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    places = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    for i, (group, param) in zip(ids, places, strict=True):
        saved = state_dict["state"].get(i)
        if saved is None:
            continue
        for name, make in moments.items():
            moment = loaded_moment(name, saved, param, group, signed=make.signed)
            if moment is not None:
                optimizer.state[param][name] = moment
        if WEIGHT_ERROR in saved:
            part = _part(saved[WEIGHT_ERROR], param).to(torch.int8, copy=True)
            optimizer.state[param][WEIGHT_ERROR] = _placed(part, param)


def _indexed(saved: dict[str, Any], optimizer: Optimizer) -> list[tuple[Any, Tensor]]:
    """Parameters with their numbers in a state dict; where there are others, torch says so."""
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return list(zip(ids, params, strict=False))


def _placed(part: Tensor, param: Tensor) -> Tensor:
    """What a rank has of a tensor whose rows go with a parameter's, as a DTensor if that is one."""
    if not isinstance(param, DTensor):
        return part
    shape = torch.Size((param.shape[0], *part.shape[1:]))
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        part,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=shape,
        stride=whole.stride(),
    )


def _part(value: Tensor, param: Tensor) -> Tensor:
    """What this rank has of a tensor that a checkpoint has given whole, or in parts."""
    if isinstance(value, DTensor):
        if isinstance(param, DTensor):
            value = value.redistribute(param.device_mesh, param.placements)
            return value.to_local().to(param.device)
        return value.full_tensor().to(param.device)
    return (
        local_part(split_as(value, param)) if isinstance(param, DTensor) else value.to(param.device)
    )
