"""Weights and states of a module of which each rank of a pipeline has a part.

Differs: from what FSDP2 writes and reads, nothing: a file is one process's, and a folder FSDP2's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.optim import Optimizer

from lightning_ext.strategies._export import write_weights
from lightning_ext.strategies._fsdp2._checkpoints import Target, read_checkpoint
from lightning_ext.strategies._fsdp2._optimizer_states import (
    Order,
    State,
    named_state,
    parameter_names,
    plain_name,
)
from lightning_ext.strategies._pipeline._checkpoints_gather import to_rank_0
from lightning_ext.strategies._pipeline._parts import Parts


@dataclass(frozen=True)
class Checkpoints:
    """What goes into checkpoints of a split module, and comes out of them.

    Args:
        module: The LightningModule.
        parts: What of it is here and what elsewhere.
        mesh: (data_parallel, pipeline).
        device: Of this rank.
    """

    module: LightningModule
    parts: Parts
    mesh: DeviceMesh
    device: torch.device

    def weights(self, *, in_parts: bool) -> dict[str, Any]:
        """Weights and buffers; all ranks must call.

        Args:
            in_parts: Whether each rank gives what it has, or rank 0 all.
        """
        state = self.module.state_dict()
        own = {name: value for name, value in state.items() if self.parts.counts(name)}
        if in_parts:
            # Of what replicas have whole, buffers among it, the first one's counts.
            own = {n: x for n, x in own.items() if self._is_first or isinstance(x, DTensor)}
            return {plain_name(name): value for name, value in own.items()}
        named = {n: x for n, x in own.items() if self.parts.first_name(n) == n}
        found = to_rank_0(named, self.mesh, self.device)
        order = dict.fromkeys([*self.parts.sizes, *found])
        first = {name: self.parts.first_name(name) for name in order}
        whole = OrderedDict((n, found[one]) for n, one in first.items() if one in found)
        setattr(whole, "_metadata", getattr(state, "_metadata", None))  # noqa: B010
        return whole

    def state(
        self, optimizer: Optimizer, optimizers: Sequence[Optimizer], *, in_parts: bool
    ) -> State:
        """The state of an optimizer; all ranks must call.

        Args:
            optimizer: One of them, or Lightning's own around it.
            optimizers: Of the strategy.
            in_parts: Whether each rank gives what it has, by name, or rank 0 all.
        """
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        order = self.parts.orders[[one is optimizer for one in optimizers].index(True)]
        _require_groups(optimizer, order)
        named = named_state(optimizer, parameter_names(self.module))
        states = {name: one for name, one in named["state"].items() if self.parts.counts(name)}
        if in_parts:
            groups = _with_members(named["param_groups"], order)
            return {"param_groups": groups, **({"state": states} if states else {})}
        found = to_rank_0(states, self.mesh, self.device)
        return {} if dist.get_rank() else _by_index(named, found, order)

    def load(
        self, path: Path, optimizers: Sequence[Optimizer], weights_only: bool | None
    ) -> dict[str, Any]:
        """Reads a folder or a file, whoever wrote it; all ranks must call.

        Args:
            path: Of it.
            optimizers: None, for an evaluation.
            weights_only: As in ``torch.load``.

        Returns:
            What else is in it.

        Raises:
            ValueError: There is no checkpoint.
            KeyError: It has no states of optimizers, and they are asked for.
            MisconfigurationException: Its names or shapes are not the module's.
        """
        state = self.module.state_dict()
        raw = {plain_name(name): name for name in state}
        target = Target(
            self.module,
            {name: state[one] for name, one in raw.items()},
            {plain_name(name): size for name, size in self.parts.sizes.items()},
            lambda own: self.module.load_state_dict(
                {raw[name]: value for name, value in own.items()}, strict=False
            ),
            parameter_names(self.module),
            optimizers,
            self.parts.orders[: len(optimizers)],
        )
        return read_checkpoint(path, target, weights_only)

    def export(self, path: Path) -> None:
        """Writes what ``LightningModule.load_from_checkpoint`` reads; all ranks must call.

        Args:
            path: Of the file, on rank 0.
        """
        write_weights(self.module.trainer, path, lambda: self.weights(in_parts=False))

    @property
    def _is_first(self) -> bool:
        """Whether this rank is of the first replica."""
        return self.mesh.get_local_rank("data_parallel") == 0


def _by_index(named: State, found: dict[str, Any], order: Order) -> State:
    """As one process has it."""
    index = {name: i for i, name in enumerate(name for group in order for name in group)}
    states = {index[name]: one for name, one in found.items()}
    members = [[index[name] for name in group] for group in order]
    groups = _with_members(named["param_groups"], members)
    return {"state": dict(sorted(states.items())), "param_groups": groups}


def _with_members(groups: Sequence[dict[str, Any]], members: Sequence[Any]) -> list[dict[str, Any]]:
    return [{**group, "params": one} for group, one in zip(groups, members, strict=True)]


def _require_groups(optimizer: Optimizer, order: Order) -> None:
    if len(optimizer.param_groups) != len(order):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} has {len(optimizer.param_groups)} groups of parameters,"
            f" and configure_optimizers made {len(order)}; allowed are those alone."
            " Hint: make all groups at once, and give those that wait a learning rate of 0."
        )
