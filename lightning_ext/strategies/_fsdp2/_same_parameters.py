"""Whether all ranks use the same parameters of a unit; where they do not, gradients mix."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_ext._lightning import own_parameters


class SameParameters:
    """Refuses windows in which ranks have gradients for different parameters of a unit.

    FSDP2 reduces what a rank has, in a row, so that those of different ranks must be the same. They
    agree in the first window, and again when others are frozen; later each rank only sees to it
    that it does the same again, without asking. Units that it has not used at all are left out.

    Args:
        module: With everything sharded, and nothing gathered.
        units: Of the module, by name.
        device: For what ranks ask each other.
        owner: Name of the strategy.

    Raises:
        MisconfigurationException: In a backward pass; with the parameters.
    """

    def __init__(
        self, module: nn.Module, units: Mapping[str, FSDPModule], device: torch.device, owner: str
    ) -> None:
        names = {id(one): name for name, one in module.named_parameters()}
        found = {name: own_parameters(unit) for name, unit in units.items()}
        self._names = [names.get(id(p), "?") for own in found.values() for p, _ in own]
        ends = pairwise(accumulate((len(own) for own in found.values()), initial=0))
        self._spans = {name: range(*span) for name, span in zip(units, ends, strict=True)}
        self._units = list(units.values())
        self._device, self._owner = device, owner
        self._watched: dict[int, Parameter] = {}
        self._handles: list[RemovableHandle] = []
        self._masks: set[bytes] = set()  # what was trained and what was frozen, in this window
        self._used: set[int] = set()
        self._agreed: dict[frozenset[bytes], dict[str, set[int]]] = {}

    def before_backward(self, loss: Tensor, *, is_due: bool) -> None:
        """Prepares for the backward pass of a loss.

        Args:
            loss: Of which ``backward`` will be called.
            is_due: Whether gradients are reduced in it.
        """
        pairs = [pair for unit in self._units for pair in own_parameters(unit)]
        self._masks.add(bytes(sharded.requires_grad for sharded, _ in pairs))
        for index, (_, present) in enumerate(pairs):
            if present is not None and present.requires_grad:
                self._watch(index, present)
        if is_due and frozenset(self._masks) not in self._agreed:
            indices = {id(one): i for i, pair in enumerate(pairs) for one in pair}
            self._agree({indices[id(one)] for one in _leaves(loss) if id(one) in indices})

    def after_backward(self) -> None:
        """Compares what was used in a window that was reduced with earlier ones."""
        agreed = self._agreed.setdefault(frozenset(self._masks), {})
        used, self._used, self._masks = self._used, set(), set()
        for unit, span in self._spans.items():
            own = used.intersection(span)
            other = own ^ agreed.setdefault(unit, own) if own else set()
            if other:
                raise MisconfigurationException(
                    f"A rank uses other parameters of {unit or 'the outermost unit'} than before"
                    f" ({self._told(other)}), and each rank must use the same." + self._hint()
                )

    def remove(self) -> None:
        """Looks no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], {}

    def _watch(self, index: int, present: Parameter) -> None:
        if self._watched.get(index) is not present:
            self._watched[index] = present
            note = partial(self._note, index)
            self._handles.append(present.register_post_accumulate_grad_hook(note))

    def _note(self, index: int, _: Tensor) -> None:
        self._used.add(index)

    def _agree(self, leaves: set[int]) -> None:
        used = self._used | leaves
        own = torch.tensor([zlib.crc32(repr(sorted(used)).encode())], device=self._device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        if len({*torch.cat(found).tolist()}) > 1:
            others = {*range(len(self._names))} - used
            raise MisconfigurationException(
                "The losses of ranks depend on different parameters; here not on"
                f" {self._told(others)}." + self._hint()
            )

    def _told(self, indices: set[int]) -> str:
        names = [self._names[index] for index in sorted(indices)]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more if names else "none"

    def _hint(self) -> str:
        return (
            f" Hint: {self._owner}(find_unused_parameters=True), or multiply what a rank does not"
            " use by zero, and add it to the loss."
        )


def _leaves(loss: Tensor) -> list[Tensor]:
    """Parameters that a loss depends on."""
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set(waiting)
    found = []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        following = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= following
        waiting += following
    return found
