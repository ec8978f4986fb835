"""What of a LightningModule lives on a rank, and what elsewhere.

A parameter is of a stage if a layer of the stage has it; of several stages it is tied. What no
layer has, or a module that is of no layer has, too, is outside, and on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext.strategies._fsdp2._optimizer_states import (
    own_order,
    parameter_names,
    plain_name,
)

Place = tuple[dict[str, Tensor | None], str]  # a module's parameters or buffers, and a name there


class Parts:
    """The parameters and buffers of a module by stage; takes those of other ranks out of it.

    Args:
        root: The LightningModule, whole.
        stages: The layers of each stage.
        owners: The pipeline rank of each stage.
        rank: This one.
    """

    def __init__(
        self,
        root: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        owners: Sequence[int],
        rank: int,
    ) -> None:
        self._root, self.rank, self.ranks = root, rank, max(owners) + 1
        self.orders: list[list[list[str]]] = []  # parameters by optimizer and group, of all ranks
        self.parameter_names = {name: None for name, _ in root.named_parameters()}
        self.sizes = {  # of all that a whole checkpoint has, in its order
            name: getattr(value, "shape", None) for name, value in root.state_dict().items()
        }
        homes: dict[int, set[int]] = defaultdict(set)
        layers_of: dict[int, set[int]] = defaultdict(set)
        outside = _outside(root, stages)
        for index, (members, owner) in enumerate(zip(stages, owners, strict=True)):
            for key in {*_identities(members)} - outside:
                homes[key].add(owner)
                layers_of[key].add(index)
        self._homes = {
            plain_name(name): frozenset(homes.get(id(one), range(self.ranks)))
            for name, one in root.named_modules(remove_duplicate=False)
        }
        self._stage_count: dict[str, int] = {}
        self._first_names: dict[str, str] = {}
        self._foreign: dict[int, tuple[Tensor, list[Place]]] = {}
        names: dict[int, str] = {}
        for name, value, place in _tensors(root):
            self._homes[plain_name(name)] = frozenset(homes.get(id(value), range(self.ranks)))
            self._stage_count[plain_name(name)] = len(layers_of.get(id(value), ()))
            self._first_names[name] = names.setdefault(id(value), name)
            if rank not in self.homes(name):
                self._foreign.setdefault(id(value), (value, []))[1].append(place)
        self._show_as_meta()

    @property
    def root(self) -> nn.Module:
        """The LightningModule."""
        return self._root

    def homes(self, name: str) -> frozenset[int]:
        """Pipeline ranks that have a parameter or buffer, or something else of a module's state."""
        name = plain_name(name)
        found = self._homes.get(name)
        return self._homes[name.rpartition(".")[0]] if found is None else found

    def first_name(self, name: str) -> str:
        """The first of all names of a parameter or buffer."""
        return self._first_names.get(name, name)

    def counts(self, name: str) -> bool:
        """Whether this rank, of all that have a parameter or buffer, gives it to a checkpoint."""
        return self.rank == min(self.homes(name))

    def is_shared(self, name: str) -> bool:
        """Whether a parameter is outside of the stages, or of several of them."""
        return self._stage_count[plain_name(name)] != 1

    def has_copies(self, name: str) -> bool:
        """Whether several ranks may have a parameter whole."""
        return self.is_shared(name) or self.sizes.get(name) == torch.Size()

    def show(self) -> None:
        """Puts parameters of other ranks on the meta device into the module."""
        for value, places in self._foreign.values():
            for table, name in places:
                table[name] = value

    def show_as_trained(self, group: dist.ProcessGroup) -> None:
        """The same after :meth:`hide`, with a gradient where their rank takes one; all must call.

        Args:
            group: Of the pipeline.
        """
        own = {name: p.requires_grad for name, p in self._root.named_parameters()}
        found = [own] * self.ranks
        dist.all_gather_object(found, own, group=group)
        trained = {name: flag for one in found for name, flag in one.items()}
        self.show()
        for name, p in self._root.named_parameters():
            if p.is_meta:
                p.requires_grad_(trained.get(name, p.requires_grad))

    def hide(self) -> None:
        """Takes them out again: there, a layer of another rank has no parameters.

        ``parameters()`` and ``named_parameters()`` of the LightningModule leave them out, too.
        """
        for _, places in self._foreign.values():
            for table, name in places:
                table[name] = None

    def keep_own(self, optimizers: Sequence[Optimizer]) -> None:
        """Takes the parameters of other ranks out of optimizers, and remembers where they were.

        Args:
            optimizers: Made while :meth:`show` was in force.
        """
        names = parameter_names(self._root)
        self.orders = [own_order(optimizer, names) for optimizer in optimizers]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if not p.is_meta]
            for p in [p for p in optimizer.state if p.is_meta]:  # Adagrad has states at once
                del optimizer.state[p]

    def _show_as_meta(self) -> None:
        self._foreign = {
            key: (_on_meta(value), places) for key, (value, places) in self._foreign.items()
        }
        self.show()


def _identities(members: Sequence[nn.Module]) -> Iterator[int]:
    """Of all modules, parameters and buffers of layers."""
    for one in members:
        for part in (one.modules(), one.parameters(), one.buffers()):
            yield from map(id, part)


def _outside(root: nn.Module, stages: Sequence[Sequence[nn.Module]]) -> set[int]:
    """Of parameters and buffers that modules have which are of no stage."""
    inside = {id(x) for members in stages for one in members for x in one.modules()}
    rest = [module for module in root.modules() if id(module) not in inside]
    return {
        id(value)
        for module in rest
        for table in (module._parameters, module._buffers)
        for value in table.values()
        if value is not None
    }


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor, Place]]:
    """Parameters and buffers, the same again under each of its names."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    yield f"{prefix}.{name}" if prefix else name, value, (table, name)


def _on_meta(value: Tensor) -> Tensor:
    empty = torch.empty_like(value, device="meta")
    return Parameter(empty, value.requires_grad) if isinstance(value, Parameter) else empty
