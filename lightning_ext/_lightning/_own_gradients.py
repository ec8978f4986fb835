"""Gradients of one rank, before FSDP2 reduces them over the others.

Private: ``_get_fsdp_state()`` of torch's ``FSDPModule``; in its parameter groups
    ``gradient_divide_factor`` and ``fsdp_params``, and in these ``sharded_param``,
    ``_unsharded_param`` and ``unsharded_accumulated_grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

Note = Callable[[int, Tensor], None]
_units_outside: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()


class OwnGradients:
    """Hands over each gradient as autograd makes it.

    For a forward pass FSDP2 puts an unsharded parameter in the place of each sharded one; it is in
    the graph, and a hook on it sees the gradient of every backward pass by itself, whatever is done
    to it later. Nothing is communicated and nothing is kept.

    Args:
        module: The module whose parameters they are.
        parameters: Those of the optimizer; frozen ones are left out.
        note: Called with the index of a parameter and its gradient.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Parameter], note: Note) -> None:
        reshard(module)
        self._module, self._note = module, note
        self._fired: set[int] = set()
        self._watched: dict[int, Parameter] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._indices = {id(p): i for i, p in enumerate(parameters) if p.requires_grad}
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:  # in the graph itself, unless FSDP2 puts another there
                self._watch(index, parameter)

    def look(self) -> None:
        """Finds what FSDP2 has put into the graph; to be called before each backward pass."""
        for one in _sharded_parameters(self._module):
            index = self._indices.get(id(one.sharded_param))
            present: Parameter | None = getattr(one, "_unsharded_param", None)
            if index is None or present is None or self._watched.get(index) is present:
                continue
            self._watched[index] = present
            self._watch(index, present)

    def fired(self, index: int) -> bool:
        """Whether there was a gradient for this parameter."""
        return index in self._fired

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, index: int, parameter: Parameter) -> None:
        self._handles.append(parameter.register_hook(partial(self._fire, index)))

    def _fire(self, index: int, gradient: Tensor) -> None:
        self._fired.add(index)
        self._note(index, gradient)


def note_units(module: nn.Module, units: Sequence[nn.Module]) -> None:
    """Remembers modules of FSDP2 that have parameters of a module, and are not inside of it.

    Args:
        module: A module.
        units: What was sharded in its place, such as stages of a pipeline.
    """
    _units_outside[module] = tuple(units)


def reshard(module: nn.Module) -> None:
    """Puts the sharded parameters back into every module of FSDP2.

    After a forward pass without a backward pass the outermost one keeps its unsharded ones, and
    what is written to them is lost.

    Args:
        module: A module outside of its forward and backward pass.
    """
    for one in _sharded_modules(module):
        one.reshard()


def divide_factors(module: nn.Module) -> set[float]:
    """Numbers by which FSDP2 was told to divide sums over ranks; none are the ranks themselves."""
    factors = {group.gradient_divide_factor for group in _groups(module)}
    return {float(factor) for factor in factors if factor is not None}


def own_parameters(unit: FSDPModule) -> list[tuple[Parameter, Parameter | None]]:
    """Parameters of one unit, always in the same order, without those of units inside of it.

    Returns:
        Each sharded one, and what FSDP2 puts into the graph for it, from the first gathering on.
    """
    state: Any = unit._get_fsdp_state()
    found = [one for group in _groups_of(state) for one in group.fsdp_params]
    return [(one.sharded_param, getattr(one, "_unsharded_param", None)) for one in found]


def holds_unreduced(module: nn.Module) -> bool:
    """Whether FSDP2 keeps gradients of earlier micro-batches that it has not reduced yet."""
    return any(
        one.unsharded_accumulated_grad is not None
        or getattr(getattr(one, "_unsharded_param", None), "grad", None) is not None
        for one in _sharded_parameters(module)
    )


def drop_unreduced(module: nn.Module) -> None:
    """Lets go of such gradients: ``zero_grad`` does not reach them.

    Args:
        module: A module whose run has ended, perhaps within a window.
    """
    for one in _sharded_parameters(module):
        one.unsharded_accumulated_grad = None
        if hasattr(one, "_unsharded_param"):
            one._unsharded_param.grad = None


def _sharded_parameters(module: nn.Module) -> list[Any]:
    """What FSDP2 knows of each parameter; ``_unsharded_param`` from its first gathering on."""
    return [one for group in _groups(module) for one in group.fsdp_params]


def _groups(module: nn.Module) -> list[Any]:
    states = [one._get_fsdp_state() for one in _sharded_modules(module)]
    return [group for state in states for group in _groups_of(state)]


def _groups_of(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in (state._fsdp_param_group,) if group is not None]  # torch < 2.13


def _sharded_modules(module: nn.Module) -> list[Any]:
    found = [*module.modules(), *_units_outside.get(module, ())]
    return [one for one in found if isinstance(one, FSDPModule)]
