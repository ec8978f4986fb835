"""The view of a module of which each pipeline rank has some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_ext._lightning._micro_batches import MicroBatches
from lightning_ext._lightning._sharded_view import ShardedView


class SplitModule(Protocol):
    """What a view asks of a module that is split into stages."""

    def copies(self) -> set[int]:
        """Identities of gradients and parameters here that another rank counts."""

    def names(self) -> dict[str, bool]:
        """Of the parameters of all ranks, and whether several stages or none have one."""


class PipelineView(ShardedView):
    """Ranks of a pipeline see the same data and hold different layers.

    Args:
        trainer: The Trainer whose strategy is viewed.
        data_parallel_group: Ranks with the same layers, which see different data.
        pipeline_group: Ranks with different layers, which see the same data.
        split: Gives the module; it is called when something is asked of it.
        micro_batches: How a batch of the loader is cut.
    """

    def __init__(
        self,
        trainer: Trainer,
        data_parallel_group: dist.ProcessGroup,
        pipeline_group: dist.ProcessGroup,
        split: Callable[[], SplitModule],
        micro_batches: MicroBatches,
    ) -> None:
        super().__init__(trainer, data_parallel_group)
        self._pipeline_group, self._split = pipeline_group, split
        self.micro_batches = micro_batches

    @property
    def model_parallel_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups over which parameters are split: the pipeline, and with FSDP2 the replicas."""
        return (*super().model_parallel_groups, self._pipeline_group)

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters of all ranks."""
        return list(self._split().names())

    @property
    def shared_names(self) -> list[str]:
        """Names of the parameters that are of several stages or of none, alike on all ranks."""
        return [name for name, is_shared in self._split().names().items() if is_shared]

    def counted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Parameters or gradients without those that another rank counts."""
        copies = self._split().copies()
        return [x for x in tensors if id(x) not in copies]

    def sum_over_stages(self, values: Tensor) -> Tensor:
        """Adds up what the ranks of a pipeline have found in their stages."""
        whole = values.clone()
        dist.all_reduce(whole, group=self._pipeline_group)
        return whole

    def merge_stages(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """What the ranks of a pipeline have found, by name; where several have, that of the first.

        Args:
            own: What can be pickled.
        """
        size = dist.get_world_size(self._pipeline_group)
        found: list[Any] = [None] * size
        dist.all_gather_object(found, dict(own), group=self._pipeline_group)
        merged: dict[str, Any] = {}
        for one in reversed(found):
            merged = {**one, **{k: v for k, v in merged.items() if k not in one}}
        return merged

    @property
    def cuts_batches(self) -> bool:
        """Whether a training step runs the backward passes of several micro-batches: it does."""
        return True

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self.trainer.accumulate_grad_batches * self.micro_batches.count

    @property
    def accumulate_unit(self) -> int:
        """What a changed :attr:`accumulate` must be a multiple of."""
        return 1 if self.micro_batches.any_number else self.micro_batches.first

    def set_accumulate(self, accumulate: int) -> None:
        """Changes the micro-batches of a batch, and if need be the batches of a step.

        Raises:
            MisconfigurationException: A gradient would be cut or mixed here.
        """
        _, batches = self.loader_sizes(1, accumulate)
        super().set_accumulate(batches)
        self.micro_batches.count = accumulate // batches

    def split_of(self, batch: int, accumulate: int) -> tuple[int, int]:
        """Micro-batch and accumulation of a loader's batch and the Trainer's accumulation."""
        return self.micro_batches.split(batch, accumulate)

    def loader_sizes(self, micro_batch: int, accumulate: int) -> tuple[int, int]:
        """A loader's batch and the Trainer's accumulation that make these."""
        return self.micro_batches.joined(micro_batch, accumulate)

    def set_micro_batch(self, micro_batch: int, *, accumulate: int | None = None) -> int | None:
        """Asks the train loader's sampler for batches of another number of micro-batches.

        Args:
            micro_batch: Samples per forward pass on one rank, as they are.
            accumulate: Micro-batches per optimizer step.

        Returns:
            The batch of this epoch at which it holds, ``None`` for the next epoch.

        Raises:
            MisconfigurationException: Another micro-batch, or no :class:`AdaptiveBatchSampler`.
        """
        if micro_batch != self.micro_batches.samples:
            raise MisconfigurationException(
                f"A micro-batch of {micro_batch} samples was asked for, and stages of a pipeline"
                f" pass on {self.micro_batches.samples}. Allowed is another number of them. Hint:"
                " max_micro_batch=None."
            )
        sizes = self.loader_sizes(micro_batch, accumulate or self.accumulate)
        return super().set_micro_batch(sizes[0], accumulate=sizes[1])

    def announce_loss_weight(self, weight: float) -> None:
        """Has the gradients of the coming batch multiplied."""
        self.micro_batches.weight = weight

    def largest(self, *values: int) -> list[int]:
        """The largest of each integer over all ranks, so that all decide alike."""
        found = torch.tensor(super().largest(*values), device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._pipeline_group)
        return [int(value) for value in found]

    def reduces(self, parameter: Tensor) -> bool:
        """Whether the strategy reduces the gradient of a parameter over replicas: any of them."""
        return True

    def sq_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sum of squares of all elements of the whole tensors, of all ranks."""
        found = list(tensors)
        return self.sq_norms([*found, None], [0] * (len(found) + 1))[0]

    def sq_norms(self, tensors: Sequence[Tensor | None], columns: Sequence[int]) -> Tensor:
        """Sums of squares by column, over all elements of the whole tensors of all ranks.

        Args:
            tensors: DTensors and plain tensors; ``None`` counts as zeros.
            columns: The column of each, the same number of them on all ranks.
        """
        copies = self._split().copies()
        counted = [None if x is None or id(x) in copies else x for x in tensors]
        # Of which dtype and device the gradients are, a rank that counts none does not know.
        sums = super().sq_norms(counted, columns).to(self._device, torch.float64)
        return self.sum_over_stages(sums)

    def save_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of all stages for a checkpoint, in host memory; all ranks must call."""
        return self.merge_stages(super().save_tensors(tensors))

    def _holds_gradients(self) -> bool:
        own = torch.tensor(float(super()._holds_gradients()), device=self._device)
        dist.all_reduce(own, dist.ReduceOp.MAX, group=self._pipeline_group)
        return bool(own)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.trainer.strategy.root_device
        return device
