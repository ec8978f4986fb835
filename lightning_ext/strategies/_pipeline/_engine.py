"""Runs micro-batches through the stages by torch's own schedules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from lightning_ext._lightning import MicroBatches
from lightning_ext.strategies._pipeline._data_parallel import Replica
from lightning_ext.strategies._pipeline._rehearsal import Meta, Metas

ScheduleName = Literal["breadth_first", "gpipe", "1f1b", "interleaved_1f1b"]
SCHEDULES: dict[str, Any] = {
    "breadth_first": ScheduleLoopedBFS,
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
}


# Before torch 2.13 a stage expects a gradient of everything that it receives.
_FLOATS = {"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
_HAS_INTEGERS = "loss_kwargs" in inspect.signature(ScheduleGPipe.step).parameters


class _ReducingStage(PipelineStage):
    """A stage that can leave the reduction over data-parallel ranks to a later batch."""

    reduces = True
    micro_batches = MicroBatches()

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.micro_batches.backward(bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not _HAS_INTEGERS and self.has_backward and not self.is_first:
            infos = self.args_recv_info[bwd_chunk_id]
            buffers: list[Any] = [info.buffer for info in infos]
            pairs = zip(self.bwd_cache[bwd_chunk_id], buffers, strict=False)
            filled = (torch.zeros_like(x) if g is None else g for g, x in pairs)
            self.bwd_cache[bwd_chunk_id] = tuple(filled)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.reduces and self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)
            if isinstance(self.submod, Replica):
                self.submod.start()
        elif isinstance(self.submod, FSDPModule):
            self.submod.reshard()

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 would send to itself, which gloo does not
        return [] if self.group_size == 1 else super()._get_init_p2p_neighbors_ops()

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        last = last_backward and self.reduces
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward=last)


class Engine:
    """The local stages of a rank, and a schedule for the present shapes.

    Args:
        stages: Local ones by index.
        owners: The pipeline rank of each stage.
        group: Of the pipeline.
        device: Of this rank.
        schedule: A key of :data:`SCHEDULES`.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        owners: Sequence[int],
        group: dist.ProcessGroup,
        device: torch.device,
        schedule: ScheduleName,
    ) -> None:
        self.stages, self.owners, self.group, self.device = dict(stages), owners, group, device
        self.rank = dist.get_rank(group)
        self._schedule = schedule
        self.micro_batches = MicroBatches()
        self._loss: Callable[[Any, Tensor], Tensor] = _unset
        self._prepared: dict[bool, tuple[Any, Any, list[_ReducingStage]]] = {}

    @property
    def is_first(self) -> bool:
        """Whether the first stage is here."""
        return self.owners[0] == self.rank

    @property
    def is_last(self) -> bool:
        """Whether the last stage is here."""
        return self.owners[-1] == self.rank

    def train(
        self,
        metas: list[Metas],
        count: int,
        loss: Callable[[Any, Tensor], Tensor],
        *,
        reduces: bool,
    ) -> list[Tensor]:
        """Forward and backward pass of a batch.

        Args:
            metas: What each stage gives to the next.
            count: Micro-batches.
            loss: Of the output of the last stage and the index of a micro-batch.
            reduces: Whether gradients are reduced over data-parallel ranks in the end.

        Returns:
            The loss of each micro-batch on the last rank, none on others.
        """
        if not _HAS_INTEGERS:
            _require_floats(metas)
        schedule, stages = self._ready(metas, count, train=True)
        for stage in stages:
            stage.reduces, stage.micro_batches = reduces, self.micro_batches
        self.micro_batches.ran = count
        losses: list[Tensor] = []
        self._loss = loss
        indices = torch.arange(count)
        target = indices if self.is_last else None
        schedule.step(micro_batch=indices, target=target, losses=losses, return_outputs=False)
        for replica in self.stages.values():
            if isinstance(replica, Replica):
                replica.finish()
        return losses

    def evaluate(self, metas: list[Metas], count: int) -> list[Any]:
        """Forward pass of a batch.

        Args:
            metas: What each stage gives to the next.
            count: Micro-batches.

        Returns:
            What the last stage makes of each micro-batch, on the last rank.
        """
        found: list[Any] = []
        last = self.stages.get(len(self.owners) - 1)
        handle = None
        if last is not None:
            handle = last.register_forward_hook(lambda *call: found.append(call[-1]))
        schedule, _ = self._ready(metas, count, train=False)
        try:
            schedule.step(micro_batch=torch.arange(count), return_outputs=False)
        finally:
            if handle is not None:
                handle.remove()
        return found

    def _ready(
        self, metas: list[Metas], count: int, *, train: bool
    ) -> tuple[Any, list[_ReducingStage]]:
        key = (tuple(metas), count)
        known = self._prepared.get(train)
        if known is None or known[0] != key:
            self._prepared.pop(train, None)  # its room is free before new room is taken
            known = (key, *self._made(metas, count, train=train))
            self._prepared[train] = known
        return known[1], known[2]

    def _made(
        self, metas: list[Metas], count: int, *, train: bool
    ) -> tuple[Any, list[_ReducingStage]]:
        stages = [self._stage(index, metas) for index in sorted(self.stages)]
        cls = SCHEDULES[self._schedule]
        single = issubclass(cls, PipelineScheduleSingle)
        if not train:  # these two take any number of micro-batches
            cls = ScheduleGPipe if single else ScheduleLoopedBFS
        made, loss = stages[0] if single else stages, self._call_loss if train else None
        try:
            schedule = cls(made, count, loss_fn=loss, scale_grads=False)
        except ValueError as error:  # the same on all ranks
            reason = str(error).rstrip(".")
            raise MisconfigurationException(
                f"torch's {cls.__name__} does not take {count} micro-batches on"
                f" {len(self.owners)} stages and {dist.get_world_size(self.group)} ranks: {reason}."
                " Hint: another num_microbatches, or schedule='breadth_first'."
            ) from error
        return schedule, stages

    def _call_loss(self, output: Any, index: Tensor) -> Tensor:
        return self._loss(output, index)

    def _stage(self, index: int, metas: list[Metas]) -> _ReducingStage:
        inputs = metas[index - 1] if index else ()
        outputs = metas[index]
        return _ReducingStage(
            self.stages[index],
            index,
            len(self.owners),
            self.device,
            input_args=_examples(inputs),
            output_args=_examples(outputs),
            group=self.group,
        )


def _is_marked(meta: Meta) -> bool:
    return not _HAS_INTEGERS and meta.dtype.is_floating_point


def _examples(metas: Metas) -> tuple[Tensor, ...]:
    return tuple(
        one._replace(requires_grad=one.requires_grad or _is_marked(one)).example("meta")
        for one in metas
    )


def _require_floats(metas: Sequence[Metas]) -> None:
    """The same on all ranks."""
    wrong = {str(one.dtype) for found in metas[:-1] for one in found} - _FLOATS
    if wrong:
        raise MisconfigurationException(
            f"Stages give {', '.join(sorted(wrong))} to each other; allowed before torch 2.13 are"
            f" {', '.join(sorted(_FLOATS))}. Hint: make integers of floats within a stage, or"
            " split elsewhere, by split=[…]."
        )


def _unset(output: Any, index: Tensor) -> Tensor:
    raise AssertionError("a schedule runs in train() and evaluate() alone")
