"""Splits a LightningModule into stages, and makes of them what a training step needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.tensor import DeviceMesh
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext._lightning import MicroBatches, note_units
from lightning_ext.strategies._pipeline._arguments import check_layers
from lightning_ext.strategies._pipeline._checkpoints import Checkpoints
from lightning_ext.strategies._pipeline._data_parallel import align, replicate
from lightning_ext.strategies._pipeline._engine import Engine
from lightning_ext.strategies._pipeline._layer_times import layer_seconds
from lightning_ext.strategies._pipeline._layers import Layers, find_layers
from lightning_ext.strategies._pipeline._optimizers import check_optimizers
from lightning_ext.strategies._pipeline._outside import sync_metrics_over
from lightning_ext.strategies._pipeline._parts import Parts
from lightning_ext.strategies._pipeline._ready import mark_split, materialize
from lightning_ext.strategies._pipeline._run import Run
from lightning_ext.strategies._pipeline._settings import Settings
from lightning_ext.strategies._pipeline._shared import (
    Homes,
    SharedGradients,
    require_equal_copies,
)
from lightning_ext.strategies._pipeline._split import first_layers
from lightning_ext.strategies._pipeline._stage import Context, Stage


@dataclass(frozen=True)
class Pipeline:
    """A split module.

    Args:
        parts: What of it is here and what elsewhere.
        engine: The local stages.
        run: Its steps.
        shared: Reduces what is on several ranks of a pipeline.
        checkpoints: Weights and states of all ranks.
        counted_elsewhere: Parameters here that another rank of the pipeline counts.
        replicas: Ranks with the same stages, which see different data.
    """

    parts: Parts
    engine: Engine
    run: Run
    shared: SharedGradients
    checkpoints: Checkpoints
    counted_elsewhere: frozenset[Parameter]
    replicas: dist.ProcessGroup

    def show(self) -> None:
        """Lets all ranks have all names again, as after a fit; all must call."""
        self.parts.show_as_trained(self.engine.group)

    def copies(self) -> set[int]:
        """Identities of parameters and gradients here that another rank counts."""
        return {id(x) for p in self.counted_elsewhere for x in (p, p.grad) if x is not None}

    def begin_fit(self, optimizers: Sequence[Optimizer], micro_batches: MicroBatches) -> None:
        """Takes what optimizers have of other ranks out of them.

        Args:
            optimizers: Made while ``parts`` showed what is on other ranks.
            micro_batches: How batches of this fit are cut.
        """
        check_optimizers(optimizers, self.parts.ranks)
        self.parts.keep_own(optimizers)
        self.run.begin_fit()
        self.engine.micro_batches = micro_batches

    def align(self) -> None:
        """Has all ranks begin alike to train or to evaluate; all must call."""
        self.run.align()
        require_equal_copies(self.parts, self.engine.device)
        sync_metrics_over(self.parts.root, self.replicas)

    def share(self) -> None:
        """Has all ranks have the same outside of the stages; all must call."""
        self.run.share_buffers()
        require_equal_copies(self.parts, self.engine.device)

    def names(self) -> dict[str, bool]:
        """Of the parameters of all ranks, and whether several stages or none have one."""
        return {name: self.parts.is_shared(name) for name in self.parts.parameter_names}


def build(
    module: LightningModule,
    settings: Settings,
    mesh: DeviceMesh,
    device: torch.device,
    precision: Context,
    seed: int,
) -> Pipeline:
    """Splits a module; all ranks must call.

    Args:
        module: All of it, the same on all ranks.
        settings: Of the strategy.
        mesh: (data_parallel, pipeline).
        device: Where what is here is to be.
        precision: The context of a forward pass.
        seed: The same on all ranks.
    """
    rank, ranks = mesh.get_local_rank("pipeline"), mesh.size(1)
    materialize(module, device)
    layers = find_layers(module, settings.module)
    check_layers(settings, ranks, len(layers.members))
    num_stages = settings.num_stages(ranks, len(layers.members))
    seconds: Sequence[float] = ()
    if settings.split == "time":
        how = {"recompute": settings.activation_checkpointing}
        seconds = layer_seconds(module, layers, device, precision, **how)
    starts = first_layers(layers.members, num_stages, settings.split, seconds)
    owners = [index % ranks for index in range(num_stages)]
    members = _cut(layers, starts)
    mark_split(module)
    rank_zero_info(
        f"{num_stages} stages of {layers.name or type(module).__name__!r} on {ranks} ranks, from"
        f" layers {starts} of {len(layers.members)}; a summary of the model shows those of a rank."
    )
    parts = Parts(module, members, owners, rank)
    parts.hide()
    module.to(device)
    stages = {
        index: Stage(
            members[index],
            starts[index],
            unpacks=layers.unpacks,
            precision=precision,
            recompute=settings.activation_checkpointing,
        )
        for index, owner in enumerate(owners)
        if owner == rank
    }
    whole = _whole(module, parts)
    kinds = {parts.homes(name) for name in parts.parameter_names}
    shared = SharedGradients(whole, mesh, kinds)
    shared.align()
    replicas = _replicated(module, stages, whole, settings, mesh)
    note_units(module, list(replicas.values()))
    engine = Engine(replicas, owners, mesh.get_group("pipeline"), device, settings.schedule)
    local = [stages[index] for index in sorted(stages)]
    replica = mesh.get_local_rank("data_parallel")
    parts_of_call = settings.num_eval_microbatches
    run = Run(module, layers, engine, local, precision, seed, replica, parts_of_call)
    data_parallel = mesh.get_group("data_parallel")
    copies = frozenset(p for p, homes in whole.items() if rank != min(homes))
    checkpoints = Checkpoints(module, parts, mesh, device)
    return Pipeline(parts, engine, run, shared, checkpoints, copies, data_parallel)


def _cut(layers: Layers, starts: Sequence[int]) -> list[tuple[nn.Module, ...]]:
    ends = [*starts[1:], len(layers.members)]
    return [layers.members[a:b] for a, b in zip(starts, ends, strict=True)]


def _whole(module: nn.Module, parts: Parts) -> dict[Parameter, Homes]:
    """Parameters that are not left to data parallelism, with the pipeline ranks that have them."""
    return {
        parameter: parts.homes(name)
        for name, parameter in module.named_parameters()
        if parts.is_shared(name) or parameter.ndim == 0
    }


def _replicated(
    module: nn.Module,
    stages: Mapping[int, Stage],
    whole: Mapping[Parameter, Homes],
    settings: Settings,
    mesh: DeviceMesh,
) -> dict[int, nn.Module]:
    if mesh.size(0) == 1:
        return dict(stages)
    replicas = mesh["data_parallel"]
    own = [p for p in module.parameters() if p not in whole]
    align([*own, *module.buffers()], replicas.get_group())
    how, policy = settings.data_parallel, settings.mp_policy
    for stage in stages.values():
        stage.call_dtype = policy.param_dtype if policy.cast_forward_inputs else None
    return {
        index: replicate(stage, how, replicas, whole, policy) for index, stage in stages.items()
    }
