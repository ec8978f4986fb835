"""What a callback needs to know of a strategy, the same words for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter

from lightning_ext import functional, kernels
from lightning_ext._lightning._lengths import epoch_end, epoch_is_open, sync_lengths
from lightning_ext._lightning._loader import live_sampler
from lightning_ext._lightning._own_gradients import Note, OwnGradients


class View:
    """One process that sees all data and holds all parameters.

    Args:
        trainer: The Trainer whose strategy is viewed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data."""
        return 1

    @property
    def data_parallel_rank(self) -> int:
        """Index of this rank among them."""
        return 0

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """Their process group, ``None`` for a single process."""
        return None

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node: those from k·ranks_per_node on are the node k."""
        return 1

    @property
    def model_parallel_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups over which parameters are split; their sums of squares must be added."""
        return ()

    def local_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Names and the parameters, or parts of them, that live on this rank."""
        yield from self.trainer.lightning_module.named_parameters()

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters of all ranks."""
        return [name for name, _ in self.local_parameters()]

    def counted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Parameters or gradients without those that another stage of a pipeline counts."""
        return list(tensors)

    def sum_over_stages(self, values: Tensor) -> Tensor:
        """Adds up what the ranks of a pipeline have found in their stages, each element once."""
        return values

    def merge_stages(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """What the ranks of a pipeline have found in their stages, by name."""
        return dict(own)

    def sq_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sum of squares of all elements, over the ranks that split the parameters."""
        total = functional.sq_norms(list(tensors))
        for group in self.model_parallel_groups:
            dist.all_reduce(total, group=group)
        return total

    @property
    def splits_gradients(self) -> bool:
        """Whether a backward pass leaves a part of the mean over ranks in ``grad``."""
        return False

    @property
    def divide_factors(self) -> set[float]:
        """By what sums over ranks are divided, where it is not the number of ranks."""
        return set()

    def reduces(self, parameter: Tensor) -> bool:
        """Whether the strategy reduces the gradient of a parameter over the ranks."""
        return True

    def sq_norms(self, tensors: Sequence[Tensor | None], columns: Sequence[int]) -> Tensor:
        """Sums of squares by column, over the ranks that split the parameters.

        Args:
            tensors: ``None`` counts as zeros.
            columns: The column of each, integers of at least 0.

        Returns:
            Shape (max(columns) + 1,).
        """
        with torch.no_grad():
            return kernels.sq_norms(tensors, columns)

    def reduce_columns(self, sums: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Adds up what the ranks that split tensors found in their parts of them.

        Args:
            sums: Shape (…, number of tensors): of the elements that this rank holds.
            tensors: The tensors that they are of.

        Returns:
            The same shape: of all elements, the same on all ranks that split them.
        """
        return sums

    def local_parts(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What this rank holds of each tensor."""
        return list(tensors)

    def watch_gradients(self, parameters: Sequence[Parameter], note: Note) -> OwnGradients:
        """Hands over gradients before they are added to others, or reduced over ranks.

        Args:
            parameters: Those of the optimizer; frozen ones are left out.
            note: Called with the index of a parameter and its gradient on this rank, once for each
                backward pass (in parts under reentrant checkpointing).
        """
        return OwnGradients(self.trainer.lightning_module, parameters, note)

    def gather(self, values: Tensor) -> Tensor:
        """Stacks one tensor of every data-parallel rank: shape (data_parallel_size, …)."""
        return values[None]

    def largest(self, *values: int) -> list[int]:
        """The largest of each integer over the data-parallel ranks, so that all decide alike."""
        found = self.gather(torch.tensor(values, device=self.trainer.strategy.root_device))
        return [int(value) for value in found.amax(0)]

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self.trainer.accumulate_grad_batches

    @property
    def can_set_accumulate(self) -> bool:
        """Whether :meth:`set_accumulate` may be called during fit."""
        return True

    @property
    def accumulate_unit(self) -> int:
        """What a changed :attr:`accumulate` must be a multiple of."""
        return 1

    def set_accumulate(self, accumulate: int) -> None:
        """Changes the accumulation between two windows of both the old and the new size.

        Raises:
            MisconfigurationException: A gradient would be cut or mixed here.
        """
        present = self.trainer.accumulate_grad_batches
        if accumulate != present and not self._between_windows(accumulate):
            raise MisconfigurationException(
                f"accumulate_grad_batches cannot change from {present} to {accumulate}"
                " here: a gradient would be cut. Allowed is a batch that is a multiple of both, or"
                " the end of an epoch. Hint: AdaptiveBatchSampler.resize returns such a batch."
            )
        self.trainer.accumulate_grad_batches = accumulate

    def _between_windows(self, accumulate: int) -> bool:
        loop = self.trainer.fit_loop
        batches = loop.epoch_loop.batch_progress
        if not epoch_is_open(self.trainer):
            return True
        done = batches.current.ready
        aligned = not (done % accumulate or done % self.trainer.accumulate_grad_batches)
        return aligned or batches.is_last_batch or not self._holds_gradients()

    def _holds_gradients(self) -> bool:
        return any(p.grad is not None for _, p in self.local_parameters())

    @property
    def cuts_batches(self) -> bool:
        """Whether a training step runs the backward passes of several micro-batches by itself."""
        return False

    def split_of(self, batch: int, accumulate: int) -> tuple[int, int]:
        """Micro-batch and accumulation of a loader's batch and the Trainer's accumulation."""
        return batch, accumulate

    def loader_sizes(self, micro_batch: int, accumulate: int) -> tuple[int, int]:
        """A loader's batch and the Trainer's accumulation that make these."""
        return micro_batch, accumulate

    def announce_loss_weight(self, weight: float) -> None:
        """Says by what the loss of the coming batch will be multiplied in ``on_before_backward``.

        A strategy that is through with the backward pass by then goes by this.
        """

    def set_micro_batch(self, micro_batch: int, *, accumulate: int | None = None) -> int | None:
        """Asks the train loader's sampler for another size, from the next whole window on.

        Args:
            micro_batch: Samples per forward pass on one rank.
            accumulate: Accumulation that will hold with it; the caller sets it when it is due.

        Returns:
            The batch of this epoch at which it holds, ``None`` for the next epoch.

        Raises:
            MisconfigurationException: The loader has no :class:`AdaptiveBatchSampler`.
        """
        sampler = live_sampler(self.trainer)
        if sampler is None:
            raise MisconfigurationException(
                "The micro-batch cannot change: the train loader has no AdaptiveBatchSampler. Hint:"
                " add AdaptiveBatchSize to the callbacks, or build the loader with one."
            )
        (handed,) = self.largest(sampler.handed)
        start = sampler.resize(
            micro_batch,
            accumulate or self.accumulate,
            not_before=handed,
            num_batches=epoch_end(self.trainer),
        )
        sync_lengths(self.trainer)
        return start

    def save_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors for a checkpoint, from those that live beside the parameters."""
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def load_tensors(
        self, saved: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Saved tensors on the device and in the layout of those in ``like``."""
        return {
            name: saved[name].to(device=tensor.device, dtype=tensor.dtype, copy=True)
            for name, tensor in like.items()
        }


class DistributedView(View):
    """DDP: every rank sees other data and holds all parameters."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data."""
        return self.trainer.world_size

    @property
    def data_parallel_rank(self) -> int:
        """Index of this rank among them."""
        return self.trainer.global_rank

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The group of all ranks."""
        return dist.group.WORLD

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node: as the strategy says, else the devices of a node."""
        own: int | None = getattr(self.trainer.strategy, "ranks_per_node", None)
        return own or self.trainer.num_devices

    def gather(self, values: Tensor) -> Tensor:
        """Stacks one tensor of every data-parallel rank: shape (data_parallel_size, …)."""
        found = [torch.empty_like(values) for _ in range(self.data_parallel_size)]
        dist.all_gather(found, values.contiguous(), group=self.data_parallel_group)
        return torch.stack(found)
