"""The finder under DDP: all ranks take the same trials, and the least of them decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, dataset, fit, identical, loader, run_distributed
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ext.callbacks import MicroBatchFinder

DDP: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 1}


class Uneven(Classifier):
    """Has room for 9 samples on rank 0 and for 5 on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > (9 if self.global_rank == 0 else 5):
            raise torch.OutOfMemoryError("made up")
        return super().training_step(batch, batch_idx)


class Asks(Callback):
    """Asks in the middle of fit."""

    def __init__(self, finder: MicroBatchFinder) -> None:
        self.finder = finder
        self.found = 0

    def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
        if run.global_step == 3 and not self.found:
            self.found = self.finder.ceiling(run, 64)


def history(callbacks: list[Callback], module: Classifier) -> Any:
    module, run = fit(callbacks, module=module, train=loader(64), **DDP)
    state = dict(module.state_dict()), run.optimizers[0].state_dict()
    return module.losses, state, dict(run.callback_metrics), torch.rand(1)


def uneven(subprocess: bool) -> Any:
    before = MicroBatchFinder(subprocess=subprocess)
    during = Asks(MicroBatchFinder(subprocess=subprocess))
    found = history([before, during], Uneven())
    same = identical(found, history([], Uneven()))
    sizes = [(trial.micro_batch, trial.fits) for trial in before.trials]
    return before.micro_batch, during.found, sizes, same


@pytest.mark.parametrize("subprocess", [True, False])
def test_the_least_of_the_ranks_decides_and_training_is_the_same(subprocess: bool) -> None:
    sizes = [(4, True), (8, False), (6, False), (5, True)]
    for rank in run_distributed(uneven, args=(subprocess,)):
        assert rank == (5, 5, sizes, True)


class BrokenOnOne(Classifier):
    """Has a bug that shows on rank 1 only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            raise ZeroDivisionError("a bug of the module")
        return super().training_step(batch, batch_idx)


def broken(subprocess: bool) -> str:
    with pytest.raises((RuntimeError, ZeroDivisionError)) as raised:
        fit([MicroBatchFinder(subprocess=subprocess)], module=BrokenOnOne(), **DDP)
    return str(raised.value)


@pytest.mark.parametrize("subprocess", [True, False])
def test_an_error_on_one_rank_ends_them_all(subprocess: bool) -> None:
    zero, one = run_distributed(broken, args=(subprocess,))
    assert "A trial of 4 samples raised an error on another rank" in zero
    assert "a bug of the module" in one


class Gathers(Classifier):
    """Calls collectives in every step, which rank 1 leaves out where memory ends."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and len(batch[0]) > 5:
            raise torch.OutOfMemoryError("made up")
        index, x, y = batch
        total = x.detach().mean(0)
        dist.all_reduce(total)
        parts = [torch.zeros_like(total) for _ in range(self.trainer.world_size)]
        dist.all_gather(parts, total)
        dist.barrier()
        return super().training_step((index, x + 0 * torch.stack(parts).mean(0), y), batch_idx)


def gathering(subprocess: bool) -> Any:
    finder = MicroBatchFinder(subprocess=subprocess)
    fit([finder], module=Gathers(), train=loader(32), **DDP)
    return finder.micro_batch


@pytest.mark.parametrize("subprocess", [True, False])
def test_collectives_of_a_step_wait_for_nobody(subprocess: bool) -> None:
    assert run_distributed(gathering, args=(subprocess,)) == [5, 5]


def loaded(known: bool) -> Any:
    """Rank 1 finds other circumstances than those of the checkpoint, rank 0 the same."""
    first = MicroBatchFinder()
    fit([first], module=Classifier(), train=DataLoader(dataset(32), batch_size=4), **DDP)
    state = first.state_dict()
    if not known and dist.get_rank() == 1:
        state["found_on"]["device"] = "another"
    again = MicroBatchFinder()
    again.load_state_dict(state)
    fit([again], module=Classifier(), train=DataLoader(dataset(32), batch_size=4), **DDP)
    return [trial.micro_batch for trial in again.trials]


def test_ranks_search_anew_together_or_not_at_all() -> None:
    assert run_distributed(loaded, args=(True,)) == [[], []]
    assert run_distributed(loaded, args=(False,)) == [[4, 8, 16], [4, 8, 16]]


def with_a_static_graph(subprocess: bool) -> Any:
    def losses(*callbacks: Callback) -> list[float]:
        settings = DDP | {"strategy": DDPStrategy(static_graph=True)}
        module, _ = fit(
            list(callbacks),
            module=Uneven(),
            train=loader(48),
            accumulate_grad_batches=1,
            **settings,
        )
        found: list[float] = module.losses
        return found

    if not subprocess:
        with pytest.raises(MisconfigurationException, match="static_graph=True"):
            losses(MicroBatchFinder(subprocess=False))
        return True
    return losses(MicroBatchFinder()) == losses()


@pytest.mark.parametrize("subprocess", [True, False])
def test_a_static_graph_is_learnt_from_training_alone(subprocess: bool) -> None:
    assert run_distributed(with_a_static_graph, args=(subprocess,)) == [True, True]
