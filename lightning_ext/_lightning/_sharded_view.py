"""The view of parameters that are split over ranks: DTensors beside plain ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import Parameter

from lightning_ext import kernels
from lightning_ext._lightning._base_view import DistributedView
from lightning_ext._lightning._own_gradients import divide_factors, holds_unreduced, reshard

Groups = tuple[dist.ProcessGroup, ...]


class ShardedView(DistributedView):
    """FSDP2: every data-parallel rank sees other data and holds a part of the parameters.

    What it does goes by the mesh and the placements of each tensor: parameters may be split along
    other dimensions too, or be plain tensors, which every rank holds whole.

    Args:
        trainer: The Trainer whose strategy is viewed.
        data_parallel_group: Ranks that see different data; ``None`` means the dimension
            ``data_parallel`` of the strategy's ``device_mesh``.
    """

    def __init__(
        self, trainer: Trainer, data_parallel_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(trainer)
        if data_parallel_group is None:
            strategy: Any = trainer.strategy
            data_parallel_group = strategy.device_mesh.get_group("data_parallel")
        self._group: dist.ProcessGroup = data_parallel_group

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data."""
        return dist.get_world_size(self._group)

    @property
    def data_parallel_rank(self) -> int:
        """Index of this rank among them."""
        return dist.get_rank(self._group)

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        """Their process group."""
        return self._group

    @property
    def model_parallel_groups(self) -> Groups:
        """Groups over which parameters are split; under FSDP2 the data-parallel one is of them."""
        found = [group for _, p in self.local_parameters() for group in _split_over(p)]
        return tuple(dict.fromkeys(found))

    @property
    def splits_gradients(self) -> bool:
        """Whether a backward pass leaves a part of the mean over ranks in ``grad``."""
        return True

    def local_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Names and parameters; those of FSDP2 are DTensors, of which this rank holds a part."""
        reshard(self.trainer.lightning_module)
        yield from super().local_parameters()

    def local_parts(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What this rank holds of each tensor."""
        return [None if x is None else local_part(x) for x in tensors]

    def sq_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sum of squares of all elements of the whole tensors."""
        found = list(tensors)
        return self.sq_norms([*found, None], [0] * (len(found) + 1))[0]

    def sq_norms(self, tensors: Sequence[Tensor | None], columns: Sequence[int]) -> Tensor:
        """Sums of squares by column, over all elements of the whole tensors.

        One reduction of a row of numbers for each group that splits tensors.

        Args:
            tensors: DTensors and plain tensors; ``None`` counts as zeros.
            columns: The column of each, integers of at least 0.

        Returns:
            Shape (max(columns) + 1,).
        """
        tensors = [None if x is None else _summed(x) for x in tensors]
        splits = [_split_over(x) for x in tensors]
        kinds = list(dict.fromkeys(splits))
        count = max(columns) + 1
        members = [
            kinds.index(s) * count + column for s, column in zip(splits, columns, strict=True)
        ]
        last = len(kinds) * count - 1
        local = [*self.local_parts(tensors), None]
        with torch.no_grad():
            sums = kernels.sq_norms(local, [*members, last]).view(len(kinds), count)
        return torch.stack([_over(kind, row) for kind, row in zip(kinds, sums, strict=True)]).sum(0)

    def reduce_columns(self, sums: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Adds up what the ranks found in their parts of tensors.

        Args:
            sums: Shape (…, number of tensors): of the elements that this rank holds.
            tensors: The tensors that they are of.

        Returns:
            The same shape: of all elements, the same on all ranks.
        """
        splits = [_split_over(x) for x in tensors]
        whole = sums.clone()
        for kind in dict.fromkeys(splits):
            members = [index for index, split in enumerate(splits) if split == kind]
            whole[..., members] = _over(kind, sums[..., members].contiguous())
        return whole

    @property
    def divide_factors(self) -> set[float]:
        """By what FSDP2 divides sums over ranks, where it is not the number of ranks."""
        found = divide_factors(self.trainer.lightning_module)
        return found - {float(self.data_parallel_size)}

    def reduces(self, parameter: Tensor) -> bool:
        """Whether FSDP2 reduces the gradient of a parameter: its mesh has the data-parallel ranks.

        A plain tensor, or one that is split for tensor parallelism only, is left to others.
        """
        if not isinstance(parameter, DTensor):
            return self.data_parallel_size == 1
        own = set(dist.get_process_group_ranks(self._group))
        return own <= set(parameter.device_mesh.mesh.flatten().tolist())

    def _holds_gradients(self) -> bool:
        return holds_unreduced(self.trainer.lightning_module) or super()._holds_gradients()

    def save_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors for a checkpoint, in host memory; all ranks must call."""
        return {
            name: whole.detach().to("cpu", copy=True)
            for name, whole in ((name, _whole(tensor)) for name, tensor in tensors.items())
        }

    def load_tensors(
        self, saved: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Saved tensors on the device and in the layout of those in ``like``.

        Args:
            saved: Whole tensors, the same on every rank.
            like: DTensors and plain tensors by name.
        """
        return {name: _laid_out(saved[name], tensor) for name, tensor in like.items()}


class FullyShardedView(ShardedView):
    """FSDP2 by a strategy that also reduces the gradients of what it leaves whole.

    Args:
        trainer: The Trainer whose strategy is viewed; all of its ranks see different data.
    """

    def __init__(self, trainer: Trainer) -> None:
        world = dist.group.WORLD
        assert world is not None
        super().__init__(trainer, world)

    def reduces(self, parameter: Tensor) -> bool:
        """Whether the strategy reduces the gradient of a parameter over the ranks: any of them."""
        return True


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; it shares memory with it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def _split_over(tensor: Tensor | None) -> Groups:
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _summed(tensor: Tensor) -> Tensor:
    """The same without summands on different ranks, which tensor parallelism may leave."""
    if not isinstance(tensor, DTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def _over(groups: Groups, row: Tensor) -> Tensor:
    for group in groups:
        dist.all_reduce(row, group=group)
    return row


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _laid_out(saved: Tensor, like: Tensor) -> Tensor:
    saved = saved.to(device=like.device, dtype=like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return saved
    # Every rank has it all: nobody needs to send.
    return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
