"""Where a trial runs, what it may take, and the batches it trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import Classifier, dataset, fit, identical, loader, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_ext._lightning import TrialMemory, batch_maker, loader_sizes, trial_setting, trials
from lightning_ext._lightning._trial_process import available_bytes, held_bytes
from lightning_ext.data import AdaptiveBatchSampler


def at_start(look: Callable[[Any], Any], **kwargs: Any) -> Any:
    """What a function finds in `on_train_start`."""
    found: list[Any] = []

    class Look(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            found.append(look(run))

    fit([Look()], **{"max_epochs": 1, "limit_train_batches": 1, **kwargs})
    return found[0]


def memory_of(run: Any, **change: Any) -> TrialMemory:
    return TrialMemory(run, **{"fraction": 0.9, "max_bytes": None, "subprocess": "auto", **change})


def test_a_batch_holds_the_first_samples_and_begins_again() -> None:
    index, x, _ = at_start(lambda run: batch_maker(run)(7), train=loader(5))
    assert index.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert torch.equal(x[5:], x[:2])


def test_a_batch_is_collated_as_the_loader_does() -> None:
    def collate(samples: list[Any]) -> Any:
        return torch.utils.data.default_collate(samples[::-1])

    index, *_ = at_start(lambda run: batch_maker(run)(3), train=loader(8, collate_fn=collate))
    assert index.tolist() == [2, 1, 0]


def test_a_data_set_that_fetches_many_at_once() -> None:
    train = DataLoader(Subset(dataset(8), [5, 1, 4]), batch_size=2)
    index, *_ = at_start(lambda run: batch_maker(run)(4), train=train)
    assert index.tolist() == [5, 1, 4, 5]


def test_making_batches_draws_no_random_number() -> None:
    def look(run: Any) -> bool:
        before = torch.get_rng_state()
        batch_maker(run)(16)
        return torch.equal(torch.get_rng_state(), before)

    assert at_start(look)


@pytest.mark.parametrize(
    ("train", "sizes"),
    [
        (lambda: loader(50, batch_size=6), (6, 50)),
        (lambda: loader(50, batch_sampler=AdaptiveBatchSampler(range(50), 9)), (9, 50)),
    ],
)
def test_sizes_of_the_loader(train: Callable[[], Any], sizes: tuple[int, int]) -> None:
    assert at_start(loader_sizes, train=train()) == sizes


class Stream(IterableDataset[Any]):
    """Samples without positions."""

    def __iter__(self) -> Iterator[Any]:
        yield from dataset(8)


class Endless:
    """A loader of its own kind."""

    def __iter__(self) -> Iterator[Any]:
        yield from loader(8)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "Stream has no samples at known positions"),
        (lambda: DataLoader([loader(8).dataset[:4]], batch_size=None), "batch_size=None"),
        (lambda: CombinedLoader([loader(8), loader(8)]), "there are 2"),
        (lambda: Endless(), "of type Endless"),
    ],
)
def test_loaders_that_give_no_single_samples(train: Callable[[], Any], message: str) -> None:
    class Any3(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[0] if len(batch) < 3 else batch, batch_idx)

    def look(run: Any) -> str:
        assert loader_sizes(run) is None
        with pytest.raises(MisconfigurationException, match=rf"{message}.*make_batch"):
            batch_maker(run)
        return "refused"

    assert at_start(look, train=train(), module=Any3()) == "refused"


def test_on_a_host_the_room_is_a_part_of_what_it_has() -> None:
    memory = at_start(memory_of)
    assert memory.forks
    assert 0 < memory.limit - memory.held < 0.91 * available_bytes()
    assert "MiB on top of" in str(memory)


def test_processes_of_a_node_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(run: Any) -> int:
        if shared:
            monkeypatch.setattr(Trainer, "num_devices", 4)
        memory = memory_of(run)
        return memory.limit - memory.held

    shared = False
    alone = at_start(look)
    shared = True
    assert at_start(look) == pytest.approx(alone / 4, rel=0.2)


def test_a_limit_in_bytes_is_for_the_whole_process() -> None:
    assert at_start(lambda run: memory_of(run, max_bytes=10**9)).limit == 10**9


def test_without_a_child_process_a_host_has_no_limit() -> None:
    def look(run: Any) -> Any:
        with pytest.raises(MisconfigurationException, match="max_memory_bytes=5 on cpu needs"):
            memory_of(run, max_bytes=5, subprocess=False)
        memory = memory_of(run, subprocess=False)
        return memory.forks, memory.limit, str(memory)

    assert at_start(look) == (False, None, "what cpu has")


def test_a_child_process_where_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ext._lightning._trials.can_fork", lambda: False)

    def look(run: Any) -> bool:
        with pytest.raises(MisconfigurationException, match="subprocess=True on cpu"):
            memory_of(run, subprocess=True)
        return memory_of(run).forks

    assert at_start(look) is False


class Hungry(Classifier):
    """Says that memory ran out from 9 samples on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) >= 9:
            raise torch.OutOfMemoryError("made up")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("subprocess", [True, False])
def test_a_trial_says_whether_it_fits_and_leaves_no_trace(subprocess: bool) -> None:
    def look(run: Any) -> Any:
        memory, make = memory_of(run, subprocess=subprocess), batch_maker(run)
        before = {
            name: tensor.clone() for name, tensor in run.lightning_module.state_dict().items()
        }
        with trials(run, memory, seconds=30) as fits:
            found = [fits(lambda n=n: make(n)) for n in (8, 9, 8)]
            # The same inside the block, where more trials may follow.
            assert identical(dict(run.lightning_module.state_dict()), before)
        assert run.lightning_module.seen == []
        return [(outcome.fits, outcome.reason) for outcome in found]

    fitting, failing = (True, ""), (False, "out of memory")
    assert at_start(look, module=Hungry()) == [fitting, failing, fitting]


class Broken(Classifier):
    """Asks for a column that is not there."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append([1])
        raise KeyError("column")


def test_another_error_is_raised_in_place_and_leaves_no_trace() -> None:
    module = Broken()

    def look(run: Any) -> None:
        memory, make = memory_of(run, subprocess=False), batch_maker(run)
        with trials(run, memory, seconds=30) as fits:
            fits(lambda: make(4))

    with pytest.raises(KeyError, match="column"):
        at_start(look, module=module)
    assert module.seen == []


def test_a_limit_that_is_reached_already_fits_nothing() -> None:
    def look(run: Any) -> bool:
        memory, make = memory_of(run, max_bytes=held_bytes() // 2), batch_maker(run)
        with trials(run, memory, seconds=30) as fits:
            return fits(lambda: make(1)).fits

    assert at_start(look) is False


def test_the_setting_tells_modules_and_precisions_apart() -> None:
    plain = at_start(trial_setting)
    assert plain == at_start(trial_setting, train=loader(8))
    assert plain != at_start(trial_setting, module=Hungry())
    assert plain != at_start(trial_setting, precision="bf16-mixed")
    assert plain != at_start(trial_setting, module=Classifier("sgd"))
    frozen = Classifier()
    frozen.net[0].requires_grad_(False)
    assert plain != at_start(trial_setting, module=frozen)


def test_the_combined_loader_is_known_before_training_starts() -> None:
    assert trainer().fit_loop._combined_loader is None
    assert len(at_start(lambda run: run.fit_loop._combined_loader.flattened)) == 1


@pytest.mark.parametrize(("subprocess", "steps"), [(True, 4), (False, 2)])
def test_a_trial_takes_as_many_steps_as_memory_needs_to_settle(
    subprocess: bool, steps: int
) -> None:
    def look(run: Any) -> list[bool]:
        def fits_until(last: int) -> bool:
            calls: list[int] = []

            def make() -> Any:
                calls.append(1)
                if len(calls) == last:
                    raise torch.OutOfMemoryError("made up")
                return batch_maker(run)(4)

            with trials(run, memory_of(run, subprocess=subprocess), seconds=30) as fits:
                return fits(make).fits

        return [fits_until(steps), fits_until(steps + 1)]

    assert at_start(look) == [False, True]
