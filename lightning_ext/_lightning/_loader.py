"""Puts an AdaptiveBatchSampler into the train loader, wherever the loader comes from.

Private: ``fit_loop._data_source``, ``fit_loop._combined_loader``,
    ``_data_connector._resolve_sampler``, ``_accelerator_connector.use_distributed_sampler``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sized
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_ext.data import AdaptiveBatchSampler

Prepare = Callable[[AdaptiveBatchSampler], None]


class _AdaptiveSource(_DataLoaderSource):
    """Hands Lightning a copy of the user's loader that has an adaptive sampler."""

    def __init__(self, original: _DataLoaderSource, trainer: Trainer, prepare: Prepare) -> None:
        super().__init__(original.instance, original.name)
        self.original = original
        self.trainer = trainer
        self.prepare = prepare
        self.previous: AdaptiveBatchSampler | None = None

    def dataloader(self) -> Any:
        """The user's train loader with the sampler replaced."""
        self.original.instance = self.instance
        loaded = self.original.dataloader()
        if not isinstance(loaded, CombinedLoader):
            loaded = CombinedLoader(loaded, "max_size_cycle")
        loader = _adapted(self.trainer, _only_loader(loaded.flattened))
        sampler: Any = loader.batch_sampler
        _continue_from(self.previous, sampler)
        if self.previous is None:
            self.prepare(sampler)
        self.previous = sampler
        loaded.flattened = [loader]
        return loaded


def install_sampler(trainer: Trainer, prepare: Prepare) -> None:
    """Makes the next fit draw its batches from an :class:`AdaptiveBatchSampler`.

    Args:
        trainer: A Trainer before its loaders are set up.
        prepare: Called with the sampler once, before the first batch is drawn.

    Raises:
        MisconfigurationException: Now or when the loader is known: what cannot be replaced.
    """
    overfit = vars(trainer)["overfit_batches"]  # set by a connector, not declared
    if overfit > 0:
        raise MisconfigurationException(
            f"overfit_batches={overfit} replaces the sampler, so the batch size"
            " cannot change. Hint: use limit_train_batches."
        )
    source = trainer.fit_loop._data_source
    if isinstance(source, _AdaptiveSource):
        source = source.original
    trainer.fit_loop._data_source = _AdaptiveSource(source, trainer, prepare)


def uninstall_sampler(trainer: Trainer) -> None:
    """Gives the Trainer its own source of loaders back."""
    source = trainer.fit_loop._data_source
    if isinstance(source, _AdaptiveSource):
        trainer.fit_loop._data_source = source.original


def live_sampler(trainer: Trainer) -> AdaptiveBatchSampler | None:
    """The adaptive sampler that the running fit draws from, if there is one."""
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, AdaptiveBatchSampler):
            return sampler
    return None


def _only_loader(loaders: list[Any]) -> DataLoader[Any]:
    if len(loaders) != 1:
        raise MisconfigurationException(
            f"There are {len(loaders)} train loaders; a global batch is defined for one. Hint: join"
            " the data sets (torch.utils.data.ConcatDataset or StackDataset) in one DataLoader."
        )
    if not isinstance(loaders[0], DataLoader):
        raise MisconfigurationException(
            f"The train loader is a {type(loaders[0]).__name__}; allowed is a"
            " torch.utils.data.DataLoader, whose batch sampler can be replaced."
        )
    return loaders[0]


def _adapted(trainer: Trainer, loader: DataLoader[Any]) -> DataLoader[Any]:
    _check_replaceable(loader)
    if isinstance(loader.batch_sampler, AdaptiveBatchSampler):
        sampler = _with_ranks(trainer, loader.batch_sampler)
    else:
        sampler = _from_stock(trainer, loader)
    sampler.tracked = True
    adapted = copy.copy(loader)
    # A DataLoader locks these names once it is built; the copy has handed out nothing yet.
    adapted.__dict__ |= {
        "batch_sampler": sampler,
        "batch_size": None,
        "drop_last": False,
        "_iterator": None,
        "sampler": _stand_in(trainer, loader),
    }
    return adapted


def _check_replaceable(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            f"{type(loader.dataset).__name__} is an IterableDataset: it has no positions to draw"
            " from, so its batch size cannot change. Allowed is a map-style data set with a length."
            " Hint: give it __getitem__ and __len__, or read it into a list."
        )
    if not isinstance(loader.dataset, Sized):
        raise MisconfigurationException(
            f"{type(loader.dataset).__name__} has no length, so an epoch cannot be laid out."
            " Hint: give it __len__."
        )
    stock = type(loader.batch_sampler) is BatchSampler
    if not stock and not isinstance(loader.batch_sampler, AdaptiveBatchSampler):
        found = "none" if loader.batch_sampler is None else type(loader.batch_sampler).__name__
        raise MisconfigurationException(
            f"The train loader's batch sampler ({found}) cannot be replaced; allowed are torch's"
            " BatchSampler and lightning_ext.data.AdaptiveBatchSampler. Hint: build the loader with"
            " batch_sampler=AdaptiveBatchSampler(sampler, batch_size)."
        )


def _with_ranks(trainer: Trainer, sampler: AdaptiveBatchSampler) -> AdaptiveBatchSampler:
    sampler = copy.copy(sampler)  # the user's own stays as it is
    size, rank = _data_ranks(trainer)
    if sampler.num_replicas == 1 and size > 1:
        sampler.set_ranks(size, rank)
    if sampler.num_replicas != size:
        raise MisconfigurationException(
            f"The AdaptiveBatchSampler was built for {sampler.num_replicas} ranks, the Trainer has"
            f" {size}. Hint: leave num_replicas and rank out."
        )
    return sampler


def _from_stock(trainer: Trainer, loader: DataLoader[Any]) -> AdaptiveBatchSampler:
    stock: Any = loader.batch_sampler
    sampler = stock.sampler
    ranks, _ = _data_ranks(trainer)
    # Ranks of a pipeline see the same data, and would each shuffle for themselves.
    shared = ranks > 1 or (trainer.world_size > 1 and not isinstance(sampler, SequentialSampler))
    if shared and not isinstance(sampler, DistributedSampler):
        if not isinstance(sampler, (RandomSampler, SequentialSampler)):
            raise MisconfigurationException(
                f"A {type(sampler).__name__} cannot be split over {ranks} ranks. Hint:"
                " build the loader with batch_sampler=AdaptiveBatchSampler(sampler, batch_size) and"
                " a sampler that yields the same order on every rank."
            )
        sampler = _stand_in(trainer, loader)
    return AdaptiveBatchSampler(sampler, stock.batch_size, stock.drop_last, interleave=True)


def _data_ranks(trainer: Trainer) -> tuple[int, int]:
    """How many ranks see different data, and which one this is; views need the loader first."""
    found = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return found["num_replicas"], found["rank"]


def _stand_in(trainer: Trainer, loader: DataLoader[Any]) -> Any:
    """A sampler that keeps Lightning from injecting one of its own, and tells how it would."""
    if trainer.world_size == 1 or isinstance(loader.sampler, DistributedSampler):
        return loader.sampler
    if not trainer._accelerator_connector.use_distributed_sampler:
        if isinstance(loader.batch_sampler, AdaptiveBatchSampler):
            return loader.sampler
        raise MisconfigurationException(
            "use_distributed_sampler=False leaves the split over ranks to you. Hint: build the"
            " loader with batch_sampler=AdaptiveBatchSampler(sampler, batch_size)."
        )
    return trainer._data_connector._resolve_sampler(
        loader, shuffle=True, mode=RunningStage.TRAINING
    )


def _continue_from(previous: AdaptiveBatchSampler | None, sampler: AdaptiveBatchSampler) -> None:
    """Carries sizes and epoch over a reload of the loaders."""
    if previous is not None and previous is not sampler:
        sampler.resize(previous.batch_size, previous.accumulate)
        sampler.set_epoch(previous.epoch + 1)
        sampler.rescale_last_window = previous.rescale_last_window
        sampler.reference_batch = previous.reference_batch
        sampler.user_sizes = previous.user_sizes
