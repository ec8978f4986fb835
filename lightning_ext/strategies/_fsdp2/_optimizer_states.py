"""Optimizer states of parameters that ranks hold parts of: by name, or as one process has them.

Differs: from ``torch.distributed.checkpoint.state_dict``, nothing is stepped to save a state, so
    that saving changes none; a parameter without a state, such as an unused one, has none
    afterwards; what one process reads and writes goes by the optimizer's order, not the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
State = dict[str, Any]
Order = Sequence[Sequence[str]]  # names of parameters by group


def parameter_names(module: nn.Module) -> dict[Tensor, str]:
    """Names of parameters as checkpoints have them; of tied ones the first.

    Args:
        module: A sharded one; compiled and checkpointed parts have the names they had before.
    """
    return {parameter: plain_name(name) for name, parameter in module.named_parameters()}


def plain_name(name: str) -> str:
    """What a parameter or buffer was called before its module was compiled or checkpointed.

    Args:
        name: As the module now has it.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "").removesuffix(f".{wrapper[:-1]}")
    return name


def own_order(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[list[str]]:
    """Names of parameters by group.

    Args:
        optimizer: Of some of them.
        names: Of all of them.
    """
    return [[names[one] for one in group["params"]] for group in optimizer.param_groups]


def saved_state(optimizer: Optimizer, module: nn.Module, *, in_parts: bool) -> State:
    """The state for a checkpoint; all ranks must call.

    Args:
        optimizer: Of a sharded module, or Lightning's own around it.
        module: That one.
        in_parts: Whether each rank gives its parts, by name, or rank 0 all.
    """
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    if in_parts:
        return named_state(optimizer, parameter_names(module))
    return whole_state(optimizer)


def named_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> State:
    """The state by names of parameters; each rank has its parts.

    Args:
        optimizer: Of a sharded module.
        names: Of its parameters.
    """
    order = [names[one] for one in _parameters(optimizer)]
    saved = optimizer.state_dict()
    groups = [{**g, "params": [order[i] for i in g["params"]]} for g in saved["param_groups"]]
    return {"state": {order[i]: one for i, one in saved["state"].items()}, "param_groups": groups}


def whole_state(optimizer: Optimizer) -> State:
    """The state as one process would have it, in host memory.

    Args:
        optimizer: Of a sharded module; all ranks must call.

    Returns:
        On other ranks than 0 nothing.
    """
    saved = optimizer.state_dict()
    own = dist.get_rank() == 0

    def gathered(value: Tensor) -> Tensor | None:
        found = value.full_tensor() if isinstance(value, DTensor) else value
        return found.detach().to("cpu", copy=True) if own else None

    whole = {i: _mapped(saved["state"][i], gathered) for i in sorted(saved["state"])}
    return {**saved, "state": whole} if own else {}


def take_named(
    optimizer: Optimizer, names: Mapping[Tensor, str], saved: State, order: Order
) -> None:
    """Takes over a state by names, already laid out as this optimizer has it.

    Args:
        optimizer: Of a sharded module.
        names: Of its parameters.
        saved: As :func:`named_state` returns it, of parameters that are here.
        order: Of the optimizers of all ranks.

    Raises:
        MisconfigurationException: It is of other parameters, or of other groups.
    """
    index = {names[one]: i for i, one in enumerate(_parameters(optimizer))}
    own = own_order(optimizer, names)
    found = [group["params"] for group in saved["param_groups"]]
    if [set(one) for one in found] != [set(one) for one in order]:
        raise MisconfigurationException(_difference(_apart(found, order)))
    groups = [  # a setting that is empty is in no distributed checkpoint
        {**present, **group, "params": [index[name] for name in members]}
        for present, group, members in zip(
            optimizer.param_groups, saved["param_groups"], own, strict=True
        )
    ]
    states = {index[name]: one for name, one in saved.get("state", {}).items()}
    optimizer.load_state_dict({**saved, "state": states, "param_groups": groups})


def take_whole(
    optimizer: Optimizer, names: Mapping[Tensor, str], saved: State, order: Order
) -> None:
    """Takes over what one process has saved, or :func:`whole_state`, each rank its parts.

    Args:
        optimizer: Of a sharded module.
        names: Of its parameters.
        saved: The same on all ranks.
        order: Of the optimizers of all ranks.

    Raises:
        MisconfigurationException: Its groups are of other numbers of parameters.
    """
    found = [len(group["params"]) for group in saved["param_groups"]]
    own = [len(group) for group in order]
    if found != own:
        raise MisconfigurationException(_difference(f"groups of {found} parameters and {own}"))
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    ids_of = dict(zip((name for group in order for name in group), ids, strict=True))
    owners = {ids_of[names[one]]: one for one in _parameters(optimizer)}
    mine = {i: one for i, one in saved["state"].items() if i in owners}
    sizes = [(owners[i], x.shape) for i, one in mine.items() for x in _tensors(one)]
    layouts = Layouts(optimizer, sizes)
    states = {
        i: {key: _mapped(value, partial(layouts.cut, owners[i], key)) for key, value in one.items()}
        for i, one in mine.items()
    }
    groups = [
        {**group, "params": [i for i in group["params"] if i in owners]}
        for group in saved["param_groups"]
    ]
    optimizer.load_state_dict({**saved, "state": states, "param_groups": groups})


class Layouts:
    """How the tensors of a state lie on the ranks.

    One of a parameter's shape lies as the parameter. What others do is seen in a state: where there
    is none yet, a step with zero gradients and a learning rate of zero makes one.

    Args:
        optimizer: Of a sharded module.
        sizes: Parameters, and the shapes of tensors of their states.
    """

    def __init__(self, optimizer: Optimizer, sizes: list[tuple[Parameter, torch.Size]]) -> None:
        parts = [(p, size) for p, size in sizes if isinstance(p, DTensor) and len(size)]
        self._present: dict[Parameter, Any] = {}
        if any(size != p.shape for p, size in parts):
            if not optimizer.state:
                _make_states(optimizer)
            parameters = _parameters(optimizer)
            present = optimizer.state_dict()["state"].items()
            self._present = {parameters[i]: one for i, one in present}

    def empty(self, parameter: Parameter, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Room for a tensor.

        Args:
            parameter: Whose state it is of.
            key: Its name there.
            size: Its shape.
            dtype: Its dtype.
        """
        like = self._like(parameter, key, size)
        if like is None:
            return torch.empty(size, dtype=dtype, device=parameter.device if len(size) else "cpu")
        return torch.empty_like(like, dtype=dtype, requires_grad=False)

    def cut(self, parameter: Parameter, key: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that every rank has.

        Args:
            parameter: Whose state it is of.
            key: Its name there.
            whole: In host memory.
        """
        like = self._like(parameter, key, whole.shape)
        if not isinstance(like, DTensor):
            return whole.clone()
        whole = whole.to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def _like(self, parameter: Parameter, key: str, size: torch.Size) -> Tensor | None:
        if isinstance(one := self._present.get(parameter, {}).get(key), Tensor):
            return one.detach() if one.shape == size else None
        return parameter.detach() if parameter.shape == size and len(size) else None


def _make_states(optimizer: Optimizer) -> None:
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    for one in _parameters(optimizer):
        one.grad = torch.zeros_like(one) if one.requires_grad else None
    for group, rate in rates:
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    optimizer.step()
    for group, rate in rates:
        group["lr"] = rate
    optimizer.zero_grad()


def _apart(saved: Order, own: Order) -> str:
    has, wants = {n for one in saved for n in one}, {n for one in own for n in one}
    if has == wants:
        return f"the same parameters in groups of {[*map(len, saved)]} and {[*map(len, own)]}"
    return f"only there {sorted(has - wants)[:5]}, only here {sorted(wants - has)[:5]}"


def _difference(apart: str) -> str:
    return (
        f"The checkpoint has the optimizer's state of other parameters, or in other groups:"
        f" {apart}. Hint: build module and optimizer as they were, or load weights alone, by"
        " load_from_checkpoint of an export."
    )


def _parameters(optimizer: Optimizer) -> list[Parameter]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(value, found.append)
    return found


def _mapped(value: Any, call: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return call(value)
    if isinstance(value, dict):
        return {key: _mapped(one, call) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, call) for one in value)
    return value
