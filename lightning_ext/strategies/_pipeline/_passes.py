"""What training and evaluation share: shapes between stages, seeds, and calls of the submodule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten

from lightning_ext.strategies._pipeline._engine import Engine
from lightning_ext.strategies._pipeline._layers import Layers
from lightning_ext.strategies._pipeline._outside import Outside
from lightning_ext.strategies._pipeline._random import layer_seed, seeded
from lightning_ext.strategies._pipeline._redirect import Call
from lightning_ext.strategies._pipeline._rehearsal import Metas, rehearse
from lightning_ext.strategies._pipeline._stage import Context, Stage, cloned


class Passes:
    """The stages of a rank, ready to run micro-batches.

    Args:
        module: The LightningModule.
        layers: What of it is split.
        engine: The local stages.
        members: The same without what data parallelism put around them.
        precision: The context of a forward pass.
        seed: Of the run, the same on all ranks.
        replica: Index of the data-parallel rank.
    """

    def __init__(
        self,
        module: LightningModule,
        layers: Layers,
        engine: Engine,
        members: Sequence[Stage],
        precision: Context,
        seed: int,
        replica: int,
    ) -> None:
        self.module, self.layers, self.engine = module, layers, engine
        self.precision = precision
        self.outside = Outside(module, layers.members, engine.group)
        self._members, self._seed, self._replica = members, seed, replica
        self._step, self._call = 0, 0
        self._metas: dict[Any, list[Metas]] = {}
        for stage in members:
            stage.draws = self.draws

    def begin_step(self, position: int) -> None:
        """Has draws be those of a training step.

        Args:
            position: Batches of the fit before it.
        """
        self._step, self._call = position, 0

    def begin_call(self) -> None:
        """Has draws be those of the next call in evaluation."""
        self._call += 1

    def draws(self, micro_batch: int, layer: int) -> AbstractContextManager[None]:
        """The random numbers of a layer.

        Args:
            micro_batch: Index within the batch.
            layer: Index in the submodule, ``OUTSIDE`` or ``LOSS``.
        """
        place = self._step, micro_batch, layer, self._call
        return seeded(layer_seed(self._seed, self._replica, *place), self.engine.device)

    @contextmanager
    def feeding(self, calls: Sequence[Call]) -> Iterator[None]:
        """Gives the first stage its arguments, in a ``with`` block.

        Args:
            calls: Of each micro-batch; needed on the first rank alone.
        """
        first = self._members[0] if self.engine.is_first else None
        if first is not None:
            first.calls = lambda index: calls[index]
        try:
            yield
        finally:
            if first is not None:
                first.calls = None

    def told_key(self, calls: Sequence[Call]) -> Any:
        """What tells such arguments from others, as the first rank has it; all ranks must call.

        Args:
            calls: Of each micro-batch; needed on the first rank alone.
        """
        engine = self.engine
        told = [shape_of(calls[0]) if calls else None]
        source = dist.get_global_rank(engine.group, engine.owners[0])
        dist.broadcast_object_list(told, source, group=engine.group)
        return told[0]

    def metas(
        self, key: Any, calls: Sequence[Call], finish: Callable[[Any], object], *, train: bool
    ) -> list[Metas]:
        """What stages give to each other for such arguments, found out if they are new.

        Args:
            key: The same on all ranks of the pipeline; another one for other arguments.
            calls: Of each micro-batch; needed on the first rank alone.
            finish: Called in a rehearsal, on the last rank, with the output of the last stage.
            train: Whether there will be a backward pass.
        """
        engine = self.engine
        key = train, key
        together = train or any(isinstance(one, FSDPModule) for one in engine.stages.values())
        if self._is_new(key, together=together):
            place = engine.stages, engine.owners, engine.group, engine.device
            with self.feeding([cloned(call) for call in calls[:1]]):
                self._metas[key] = rehearse(
                    *place, finish, train=train, root=self.module, together=together
                )
        return self._metas[key]

    def _is_new(self, key: Any, *, together: bool) -> bool:
        """Whether the shapes are new here or, as replicas wait for each other, to any of them."""
        new = key not in self._metas
        if not together or dist.get_world_size() == dist.get_world_size(self.engine.group):
            return new
        found = torch.tensor(int(new), device=self.engine.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


def shape_of(call: Call) -> Any:
    """What two calls share if stages give to each other the same shapes for both.

    Args:
        call: Of the submodule.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    kinds = [
        (tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, Tensor) else repr(x)
        for x in leaves
    ]
    return (*kinds, str(spec))
