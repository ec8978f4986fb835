"""One forward pass beside the training, which tells all ranks the shapes between stages.

A schedule sends tensors whose shapes are known before; and what goes wrong in a layer or in the
loss goes wrong here, where all ranks learn of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from lightning_ext.strategies._pipeline._outcomes import attempt, raise_first
from lightning_ext.strategies._pipeline._skips import Graphs, Place, Stashes, common_parameters


class Meta(NamedTuple):
    """What a tensor between stages is like."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def example(self, device: torch.device | str) -> Tensor:
        """One of zeros."""
        found = torch.zeros(self.shape, dtype=self.dtype, device=device)
        return found.requires_grad_(self.requires_grad)


Metas = tuple[Meta, ...]


def rehearse(
    stages: Mapping[int, nn.Module],
    owners: Sequence[int],
    group: dist.ProcessGroup,
    device: torch.device,
    finish: Callable[[Any], object],
    *,
    train: bool,
    root: nn.Module,
    together: bool = False,
) -> list[Metas]:
    """Runs one micro-batch through all stages; all ranks of the pipeline must call.

    Buffers, attributes with tensors and generators are as before, and no gradient is left.

    Args:
        stages: This rank's by index.
        owners: The pipeline rank of each stage.
        group: Of the pipeline.
        device: Of its tensors.
        finish: Called on the last rank with the output of the last stage.
        train: Whether there will be a backward pass.
        root: The LightningModule.
        together: Whether all pipelines do this at a time, and raise errors of each other.

    Returns:
        What each stage gives to the next, and the last to the loss.

    Raises:
        MisconfigurationException: On all ranks, with what went wrong on one.
    """
    found: list[Metas] = []
    inputs: Metas = ()
    graphs, stashes = Graphs(common_parameters(root, stages)), Stashes(root)
    try:
        for index, owner in enumerate(owners):
            outcome: Any = None
            kept: list[Place] = []
            if index in stages:
                run = _Run(index, stages[index], inputs, device, graphs)
                end = finish if index == len(owners) - 1 else None
                with (
                    without_a_trace(stages[index], device),
                    stashes.of_stage(kept),
                    torch.set_grad_enabled(train),
                ):
                    where = f"stage {index} on pipeline rank {owner}"
                    outcome = attempt(where, partial(run, end))
            inputs, places = _told((outcome, kept), owner, group, together=together)
            stashes.forbid(places, index)
            found.append(inputs)
    finally:
        stashes.allow()
    return found


def _told(
    own: tuple[Any, list[Place]], owner: int, group: dist.ProcessGroup, *, together: bool
) -> tuple[Metas, list[Place]]:
    """What the owner of a stage has found, if nobody has failed."""
    world = dist.group.WORLD if together else group
    assert world is not None
    found: list[Any] = [None] * dist.get_world_size(world)
    dist.all_gather_object(found, own, group=world)
    raise_first([outcome for outcome, _ in found], own[0])
    told: tuple[Metas, list[Place]] = found[
        dist.get_global_rank(group, owner) if together else owner
    ]
    return told


@dataclass(frozen=True)
class _Run:
    index: int
    stage: nn.Module
    inputs: Metas
    device: torch.device
    graphs: Graphs

    def __call__(self, finish: Callable[[Any], object] | None) -> Metas:
        inputs = [meta.example(self.device) for meta in self.inputs]
        output = self.stage(*inputs, micro_batch=torch.tensor(0))
        found = output if type(output) in (tuple, list) else (output,)
        wrong = [type(x).__name__ for x in found if not isinstance(x, Tensor)]
        if wrong:
            raise MisconfigurationException(
                f"stage {self.index} gives {', '.join(wrong)} to"
                f" {'the next one' if finish is None else 'the loss'}; allowed are tensors, alone"
                " or in a tuple. Hint: split elsewhere, by split=[…], or let the layer return"
                " tensors, and make other things of them in training_step."
            )
        self.graphs.require_apart(self.index, found)
        if finish is not None:
            finish(output)
        return tuple(Meta(x.shape, x.dtype, x.requires_grad) for x in found)


@contextmanager
def untouched_metrics(root: nn.Module) -> Iterator[None]:
    """Refuses updates of torchmetrics in a ``with`` block, where other ranks would have none.

    Args:
        root: The LightningModule.

    Raises:
        MisconfigurationException: With the metric.
    """
    metrics = [(name, one) for name, one in root.named_modules() if isinstance(one, Metric)]
    counts = [one.update_count for _, one in metrics]
    yield
    for (name, metric), count in zip(metrics, counts, strict=True):
        if metric.update_count != count:
            raise MisconfigurationException(
                f"training_step updates {name!r}, a {type(metric).__name__}, whose state one rank"
                " of a pipeline alone would have. Allowed are numbers and tensors that are logged,"
                " and metrics in validation_step. Hint: self.log(name, value_of_this_batch)."
            )


@contextmanager
def without_a_trace(stage: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts buffers and generators back after a ``with`` block, and FSDP2's parameters away.

    Args:
        stage: Layers.
        device: Of its tensors.
    """
    buffers = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    devices = [device] if device.type != "cpu" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if isinstance(stage, FSDPModule):
            stage.reshard()
