"""Says whether a micro-batch trains, in a child process or in place.

Private: ``fit_loop._combined_loader``.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lightning_ext._lightning._out_of_memory import is_out_of_memory
from lightning_ext._lightning._trial_process import (
    Outcome,
    available_bytes,
    can_fork,
    held_bytes,
    host_bytes,
    in_child,
)
from lightning_ext._lightning._trial_step import state_restored, try_training
from lightning_ext._lightning._view import view

Trial = Callable[[Callable[[], Any]], Outcome]

_STEPS_IN_A_CHILD = 3  # the host's allocator holds more after some steps than after one


class TrialMemory:
    """How much memory a trial may take, and where it runs.

    Args:
        trainer: The Trainer in fit.
        fraction: Of a device, the part that this process may take; of the host, the part of what
            it still has, shared among the processes of this node.
        max_bytes: The most that this process may hold on its device, instead.
        subprocess: Whether trials run in a child process; ``"auto"`` where one can.

    Raises:
        MisconfigurationException: Trials cannot be run so.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        fraction: float,
        max_bytes: int | None,
        subprocess: bool | str,
    ) -> None:
        self.device = trainer.strategy.root_device
        possible = self.device.type == "cpu" and can_fork()
        self.forks = possible if subprocess == "auto" else bool(subprocess)
        if self.forks and not possible:
            raise MisconfigurationException(
                f"subprocess=True on {self.device.type}: a child process can train on the CPU of a"
                " Linux host without accelerators only. Hint: subprocess='auto'."
            )
        wrapper = trainer.strategy.model
        static = isinstance(wrapper, DistributedDataParallel) and wrapper.static_graph
        if static and not self.forks:
            # The reducer would take the trial's backward for the one that it learns the graph from.
            raise MisconfigurationException(
                f"Trials in place, on {self.device.type}, are not possible with static_graph=True."
                " Hint: find the size in a run without it."
            )
        self.held = self._held()
        self.limit = self._limit(trainer, fraction, max_bytes)

    def __str__(self) -> str:
        """The room in words."""
        if self.limit is None:
            return f"what {self.device} has"
        return f"{_mebibytes(self.limit - self.held)} on top of {_mebibytes(self.held)} held"

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return held_bytes() if self.forks else 0

    def _limit(self, trainer: Trainer, fraction: float, max_bytes: int | None) -> int | None:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return min(total, int(fraction * total) if max_bytes is None else max_bytes)
        if self.forks:
            share = fraction * available_bytes() / trainer.num_devices
            return self.held + int(share) if max_bytes is None else max_bytes
        if max_bytes is not None:
            raise MisconfigurationException(
                f"max_memory_bytes={max_bytes} on {self.device.type} needs trials in a child"
                " process. Hint: subprocess='auto' on a Linux host, or leave the limit out."
            )
        return None


@contextmanager
def trials(trainer: Trainer, memory: TrialMemory, *, seconds: float) -> Iterator[Trial]:
    """Gives a function that trains on a batch, and leaves no trace of it.

    Args:
        trainer: The Trainer in fit, between two optimizer steps.
        memory: How much a trial may take.
        seconds: The longest that a trial in a child process may take.
    """
    if memory.forks:
        limit = 0 if memory.limit is None else memory.limit
        yield lambda make: in_child(
            partial(try_training, trainer, make, steps=_STEPS_IN_A_CHILD),
            limit_bytes=limit,
            seconds=seconds,
        )
        return
    with state_restored(trainer) as restore, _device_limit(memory):
        yield partial(_in_place, trainer, restore)


def batch_maker(trainer: Trainer) -> Callable[[int], Any]:
    """A function that makes a batch of any size from the train loader's data set.

    It takes samples 0, 1, … and begins again where they end; no sampler and no worker takes part.

    Raises:
        MisconfigurationException: The loader gives no single samples.
    """
    loader = _train_loader(trainer)
    dataset: Any = loader.dataset
    fetch = getattr(dataset, "__getitems__", None)

    def make(micro_batch: int) -> Any:
        indices = [index % len(dataset) for index in range(micro_batch)]
        samples = fetch(indices) if fetch is not None else [dataset[index] for index in indices]
        return loader.collate_fn(samples)

    return make


def loader_sizes(trainer: Trainer) -> tuple[int, int] | None:
    """The train loader's batch size and its samples per rank, ``None`` where it does not say."""
    try:
        loader = _train_loader(trainer)
    except MisconfigurationException:
        return None
    dataset: Any = loader.dataset
    start = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size or 1
    return start, max(1, len(dataset) // view(trainer).data_parallel_size)


def trial_setting(trainer: Trainer) -> dict[str, Any]:
    """What the largest micro-batch depends on, in plain types: device, strategy, module."""
    module, device = trainer.lightning_module, trainer.strategy.root_device
    parameters = list(module.parameters())
    return {
        "device": _device_name(device),
        "strategy": type(trainer.strategy).__name__,
        "ranks": trainer.world_size,
        "precision": str(trainer.precision),
        "module": type(module).__qualname__,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "optimizer": [type(optimizer).__name__ for optimizer in trainer.optimizers],
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory} bytes"
    return f"{device.type}, {platform.machine()}, {host_bytes()} bytes"


def _in_place(
    trainer: Trainer, restore: Callable[[], None], make_batch: Callable[[], Any]
) -> Outcome:
    device = trainer.strategy.root_device
    held = _reset_peak(device)
    try:
        try_training(trainer, make_batch)
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
    restore()
    if not fits:
        # Out here the error is gone, and with it the activations that its traceback held. After a
        # success the cache stays as it is in training, fragments included.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _reset_peak(device)
    return Outcome(fits, peak, "" if fits else "out of memory")


def _reset_peak(device: torch.device) -> int:
    """Begins to watch the peak anew; what is held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@contextmanager
def _device_limit(memory: TrialMemory) -> Iterator[None]:
    """Has the caching allocator refuse, and free its cache first, at the limit."""
    if memory.device.type != "cuda" or memory.limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(memory.device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(memory.device)
    torch.cuda.set_per_process_memory_fraction(memory.limit / total, memory.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, memory.device)


def _train_loader(trainer: Trainer) -> DataLoader[Any]:
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    obstacle = _obstacle(loaders)
    if obstacle:
        raise MisconfigurationException(
            f"No batch of another size can be made from the train loader: {obstacle}. Hint: give"
            " make_batch=, a function from micro_batch to a batch."
        )
    loader: DataLoader[Any] = loaders[0]
    return loader


def _obstacle(loaders: list[Any]) -> str:
    if len(loaders) != 1:
        return f"there are {len(loaders)}"
    if not isinstance(loaders[0], DataLoader):
        return f"it is no torch.utils.data.DataLoader but of type {type(loaders[0]).__name__}"
    if isinstance(loaders[0].dataset, IterableDataset) or not isinstance(loaders[0].dataset, Sized):
        return f"{type(loaders[0].dataset).__name__} has no samples at known positions"
    if loaders[0].batch_sampler is None:
        return "batch_size=None says that its data set makes the batches"
    return "" if len(loaders[0].dataset) else "its data set is empty"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
