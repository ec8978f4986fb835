"""Bytes that a forward pass leaves behind for its backward pass.

Source: the saved-tensor hooks of ``torch.autograd.graph``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run ``fn`` and return the bytes of the tensors that autograd saves in it.

    Each storage counts once and whole, however many tensors share it; a batch that is saved counts
    too. Parameters, and views of them, are left out. It is no peak: gradients, temporary tensors
    and the allocator's rounding come on top. On the ``meta`` device nothing is allocated.

    Args:
        fn: a forward pass, such as a module, with gradients enabled.
        args: positional arguments of ``fn``.
        kwargs: keyword arguments of ``fn``.

    Returns:
        Bytes; what is recomputed under activation checkpointing does not count.

    Example:
        >>> saved_bytes(torch.nn.Linear(3, 5), torch.ones(2, 3))  # its input, 2 × 3 float32
        24
    """
    held: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, Parameter):
            storage = tensor.untyped_storage()
            held[id(storage)] = storage  # kept, so that no other storage gets its identity
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        fn(*args, **kwargs)
    return sum(storage.nbytes() for storage in held.values())
