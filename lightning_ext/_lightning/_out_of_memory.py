"""Which errors say that memory ran out, and where a batch can be run again after one."""

from __future__ import annotations

import gc

import torch
from lightning.pytorch import Trainer
from torch.optim import LBFGS, Optimizer

from lightning_ext._lightning._view import view

_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and "DefaultCPUAllocator" in text
        and any(words in text for words in _CPU_ALLOCATOR)
    )


def free_memory() -> None:
    """Lets go of what a failed pass has left, once its error is gone."""
    # A backward pass that fails leaves branches of the graph in the engine's queue, and with them
    # their activations; the next one on this thread throws them out.
    with torch.enable_grad():
        torch.zeros((), device="cpu", requires_grad=True).backward()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def require_repeatable(trainer: Trainer, optimizer: Optimizer, calls: int) -> None:
    """Refuses to run a batch again where others depend on its having run once.

    Args:
        trainer: The Trainer in fit.
        optimizer: What calls the closure.
        calls: How often it has, for this batch.

    Raises:
        ValueError: With what is in the way, and a hint.
    """
    seen = view(trainer)
    if seen.data_parallel_group is not None or seen.model_parallel_groups:
        raise ValueError(
            f"a rank of {trainer.world_size} cannot repeat a batch alone while the others wait for"
            " it. Hint: let callbacks.MicroBatchFinder find a micro-batch that fits on all ranks,"
            " or set a smaller one."
        )
    if calls > 1 or isinstance(optimizer, LBFGS):
        raise ValueError(
            f"{type(optimizer).__name__} calls the closure more than once in a step. Hint: a"
            " smaller micro-batch."
        )
