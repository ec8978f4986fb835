"""Batches of any number of samples, by the shapes of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ext.callbacks._memory._fake import fake_batch


def sized_batch(
    module: nn.Module, micro_batch: Any, example: Any, device: torch.device
) -> tuple[Any, bool]:
    """Makes a fake batch; within a mode that makes all tensors fake.

    Args:
        module: Which may have an ``example_input_array``.
        micro_batch: A batch, or the number of its samples.
        example: A batch of any number of samples, or ``None``.
        device: Of the batch.

    Returns:
        The batch, and whether it is the input of the forward pass alone, without targets.

    Raises:
        ValueError: There is a number and no example.
    """
    if not isinstance(micro_batch, int):
        return fake_batch(micro_batch, device), False
    only_inputs = example is None
    found = getattr(module, "example_input_array", None) if only_inputs else example
    if found is None:
        raise ValueError(
            f"micro_batch={micro_batch} is a number, and {type(module).__name__} has no"
            " example_input_array. Hint: example=batch, of any number of samples, or the batch"
            " itself as micro_batch"
        )
    return _resized(fake_batch(found, device), micro_batch), only_inputs


def samples(batch: Any) -> int:
    """Counts the samples of a batch: the first dimension of its first tensor that has one.

    Args:
        batch: As a loader yields it.

    Raises:
        ValueError: There is no such tensor.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise ValueError(f"a batch of {type(batch).__name__} has no tensor whose rows are samples")


def _resized(batch: Any, count: int) -> Any:
    """Tensors with a sample in each row get ``count`` rows; what else there is stays."""
    rows = samples(batch)

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != rows:
            return tensor
        return tensor.new_empty((count, *tensor.shape[1:]))

    return pytree.tree_map_only(Tensor, resized, batch)
