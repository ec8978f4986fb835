"""Consecutive layers as one module, which runs one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lightning_ext.strategies._pipeline._redirect import Call

Context = Callable[[], AbstractContextManager[Any]]
# Of a micro-batch and a layer.
Draws = Callable[[int, int], AbstractContextManager[Any]]


class Stage(nn.Module):
    """Layers of one stage.

    Args:
        members: Its layers.
        first: Index of its first layer in the split submodule.
        unpacks: Whether a tuple of one layer becomes several arguments of the next.
        precision: The context of a forward pass.
        recompute: Whether activations within it are computed again in the backward pass.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        first: int,
        *,
        unpacks: bool,
        precision: Context,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.first, self.unpacks = first, unpacks
        self.precision, self.recompute = precision, recompute
        self.draws: Draws = lambda micro_batch, layer: nullcontext()
        self.calls: Callable[[int], Call] | None = None
        self.call_dtype: torch.dtype | None = None  # FSDP2 casts what is passed, not a call
        # What is received is a leaf, and what is computed again starts from the inputs.
        self._changes_inputs = any(getattr(one, "inplace", False) for one in members[0].modules())

    def forward(self, *inputs: Any, micro_batch: Tensor) -> Any:
        """Runs the layers; the first stage takes its arguments from ``calls``."""
        index = int(micro_batch)
        call = Call(inputs, {}) if self.calls is None else self._cast(self.calls(index))
        with self.precision():
            if self.recompute and torch.is_grad_enabled():
                found = checkpoint(
                    self._run,
                    index,
                    call,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda: (nullcontext(), buffers_apart(self)),
                )
            else:
                found = self._run(index, call)
        return tree_map_only(Tensor, Tensor.contiguous, found)  # as it can be sent

    def _cast(self, call: Call) -> Call:
        def cast(value: Tensor) -> Tensor:
            return value.to(self.call_dtype) if value.is_floating_point() else value

        if self.call_dtype is None:
            return call
        return Call(*tree_map_only(Tensor, cast, (call.args, call.kwargs)))

    def _run(self, micro_batch: int, call: Call) -> Any:
        value: Any
        value, kwargs = cloned(call) if self._changes_inputs else call
        if not self.unpacks and len(value) > 1 and self.calls is None:
            value = (value,)  # a tuple between layers of a sequence is one argument
        for offset, layer in enumerate(self.members):
            with self.draws(micro_batch, self.first + offset):
                found = layer(*value, **kwargs)
            value, kwargs = (found if self.unpacks and isinstance(found, tuple) else (found,)), {}
        return found


@contextmanager
def buffers_apart(stage: nn.Module) -> Iterator[None]:
    """Has layers change copies of their buffers in a ``with`` block.

    Args:
        stage: Layers whose activations are computed again, which have changed buffers before.
    """
    tables = [(one._buffers, dict(one._buffers)) for one in stage.modules() if one._buffers]
    copies = {id(x): x.clone() for _, own in tables for x in own.values() if x is not None}
    try:
        for table, own in tables:
            table.update({name: copies.get(id(x)) for name, x in own.items()})
        yield
    finally:
        for table, own in tables:
            table.update(own)


def cloned(call: Call) -> Call:
    """The same arguments, which a layer may change in place.

    Args:
        call: Of the layers.
    """
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (call.args, call.kwargs))
    return Call(args, kwargs)
