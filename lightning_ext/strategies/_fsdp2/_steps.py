"""Steps of a LightningModule as forward passes of FSDP2.

Private: ``_get_fsdp_state()`` of torch's ``FSDPModule``; its ``_pre_forward_hook_handle`` and
    ``_post_forward_hook_handle``, and the functions behind them, ``_pre_forward`` and
    ``_post_forward``; what these do of their work within a step, ``_cast_forward_inputs`` and
    ``_cast_output_dtype``.
Differs: from torch's ``register_fsdp_forward_method``, a step or ``self(x)`` within a step is a
    part of it; torch would end the forward pass there, and gather again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_ABSENT = object()


def steps_gather(module: LightningModule) -> Callable[[], None]:
    """Has the steps that a module defines gather its parameters, each once.

    Args:
        module: Does nothing unless it is a module of FSDP2.

    Returns:
        What takes that back.
    """
    if not isinstance(module, FSDPModule):
        return lambda: None
    names = [name for name in _STEPS if is_overridden(name, module)]
    before = {name: vars(module).get(name, _ABSENT) for name in names}
    entry = _Entry(module)
    for name in names:
        entry.gather_for(name)

    def undo() -> None:
        entry.remove()
        for name, own in before.items():
            vars(module).pop(name, None)
            if own is not _ABSENT:
                setattr(module, name, own)

    return undo


class _Entry:
    """The outermost call of a module: a step, or outside of steps its forward."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._state = module._get_fsdp_state()
        self._is_inside = False
        self._hook(self._before, self._after)

    def remove(self) -> None:
        """Leaves the module's forward to FSDP2 again."""
        self._hook(self._state._pre_forward, self._state._post_forward)

    def gather_for(self, name: str) -> None:
        """Makes a step a forward pass, unless it is called by another one."""
        step = getattr(self._module, name)

        @functools.wraps(step)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self._inside():
                return step(*args, **kwargs)

        setattr(self._module, name, inside)
        register_fsdp_forward_method(self._module, name)
        gathering = getattr(self._module, name)

        @functools.wraps(step)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (step if self._is_inside else gathering)(*args, **kwargs)

        setattr(self._module, name, call)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def _hook(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        module, state = self._module, self._state
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        state._pre_forward_hook_handle = module.register_forward_pre_hook(
            before, prepend=True, with_kwargs=True
        )
        state._post_forward_hook_handle = module.register_forward_hook(after)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        state = self._state
        if self._is_inside:
            return state._cast_forward_inputs(args, kwargs)
        return state._pre_forward(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        state = self._state
        if self._is_inside:
            return state._cast_output_dtype(output)
        return state._post_forward(module, args, output)
