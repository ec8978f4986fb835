"""The finder in a Trainer: what it finds, what it leaves as it was, and what it says."""

from __future__ import annotations

import logging
import math
import mmap
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, fit, identical, loader, same_weights
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_ext._lightning._trial_process import held_bytes
from lightning_ext.callbacks import MicroBatchFinder

MIB = 2**20


class Limited(Classifier):
    """Runs out of memory above a number of samples, in a way of its own."""

    limit = 5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > self.limit:
            self.fail()
        return super().training_step(batch, batch_idx)

    def fail(self) -> None:
        raise torch.OutOfMemoryError("made up")


class Hungry(Classifier):
    """Takes half a MiB per sample, of which the allocator keeps nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pages = mmap.mmap(-1, len(batch[0]) * MIB // 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        activations = torch.frombuffer(pages, dtype=torch.float32).fill_(1)
        return super().training_step(batch, batch_idx) + 0 * activations[0]


class Killed(Limited):
    """Is ended by the kernel."""

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Limited):
    """Never ends."""

    def fail(self) -> None:
        time.sleep(60)


class Broken(Limited):
    """Has a bug."""

    limit = 0

    def fail(self) -> None:
        raise ZeroDivisionError("a bug of the module")


def one_step(finder: Callback, module: Classifier, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 1, **kwargs}
    return fit([finder], module=module, **settings)


class Within(Callback):
    """A finder with so much room on top of what is held when training starts."""

    def __init__(self, room: int) -> None:
        self.room = room

    def on_train_start(self, run: Any, module: Any) -> None:
        self.finder = MicroBatchFinder(max_memory_bytes=held_bytes() + self.room)
        self.finder.on_train_start(run, module)


def sizes(finder: MicroBatchFinder) -> list[int]:
    return [trial.micro_batch for trial in finder.trials]


def test_it_finds_what_memory_allows_to_within_five_percent() -> None:
    within = Within(32 * MIB)
    one_step(within, Hungry(), train=loader(batch_size=32))
    finder = within.finder
    assert finder.micro_batch is not None
    assert 0.95 * 64 <= finder.micro_batch <= 64
    assert sizes(finder)[:2] == [32, 64]
    largest = max(trial.peak_bytes for trial in finder.trials if trial.fits)
    assert largest == pytest.approx(finder.micro_batch * MIB / 2, rel=0.05)


@pytest.mark.parametrize("subprocess", [True, False])
def test_it_begins_with_the_loaders_size(subprocess: bool) -> None:
    finder = MicroBatchFinder(subprocess=subprocess)
    one_step(finder, Limited())
    assert sizes(finder) == [4, 8, 6, 5]
    assert finder.micro_batch == 5


def test_the_samples_of_a_rank_are_the_most() -> None:
    finder = MicroBatchFinder()
    one_step(finder, Classifier(), train=loader(20))
    assert (sizes(finder), finder.micro_batch) == ([4, 8, 16, 20], 20)


def test_a_limit_of_ones_own() -> None:
    finder = MicroBatchFinder(max_micro_batch=6)
    one_step(finder, Classifier())
    assert (sizes(finder), finder.micro_batch) == ([4, 6], 6)


def test_a_trial_that_the_kernel_kills_does_not_fit() -> None:
    finder = MicroBatchFinder()
    one_step(finder, Killed())
    assert finder.micro_batch == 5


def test_a_trial_that_hangs_does_not_fit() -> None:
    finder = MicroBatchFinder(trial_seconds=1.0, tolerance=0.9)
    with pytest.warns(UserWarning, match=r"8 samples was ended after trial_seconds=1"):
        one_step(finder, Hanging())
    assert finder.micro_batch == 4


def test_where_all_trials_hang_the_first_says_so() -> None:
    finder = MicroBatchFinder(trial_seconds=0.3)
    with pytest.raises(RuntimeError, match=r"4 samples was ended.*subprocess=False"):
        one_step(finder, type("AllHang", (Hanging,), {"limit": 0})())


@pytest.mark.parametrize("subprocess", [True, False])
def test_a_bug_is_raised_as_itself(subprocess: bool) -> None:
    error = RuntimeError if subprocess else ZeroDivisionError
    with pytest.raises(error, match="a bug of the module") as raised:
        one_step(MicroBatchFinder(subprocess=subprocess), Broken())
    shown = str(raised.value) if subprocess else str(raised.getrepr())
    assert "in fail" in shown or "def fail" in shown
    assert "test_micro_batch_finder.py" in shown


def test_where_one_sample_does_not_fit_it_says_how_much_there_is() -> None:
    message = r"of 1 does not train on cpu: .* MiB, .* on top of [\d,]+\.\d MiB held.* Hint"
    with pytest.raises(MisconfigurationException, match=message):
        one_step(Within(1), Hungry())


def test_the_loader_and_the_run_stay_as_they_are() -> None:
    with_it, run = fit([MicroBatchFinder()], module=Limited("sgd"), max_epochs=1)
    without, other = fit([], module=Limited("sgd"), max_epochs=1)
    assert same_weights(with_it, without)
    assert (with_it.losses, with_it.seen) == (without.losses, without.seen)
    assert identical(run.callback_metrics, other.callback_metrics)
    assert run.train_dataloader.batch_size == 4


def test_it_reports_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        one_step(MicroBatchFinder(), Limited())
    (line,) = [r.message for r in caplog.records if "MicroBatchFinder" in r.message]
    assert "largest micro-batch that trains: 5 (4 trials" in line


class Asks(Callback):
    """Asks for a ceiling after optimizer steps."""

    def __init__(self, finder: MicroBatchFinder, wanted: dict[int, int]) -> None:
        self.finder = finder
        self.wanted = wanted
        self.found: dict[int, tuple[int, int]] = {}

    def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
        step = run.global_step
        if step in self.wanted and step not in self.found and not run.fit_loop._should_accumulate():
            before = len(self.finder.trials)
            ceiling = self.finder.ceiling(run, self.wanted[step])
            self.found[step] = ceiling, len(self.finder.trials) - before


@pytest.mark.parametrize("subprocess", [True, False])
def test_a_ceiling_is_found_when_it_is_asked_for_and_remembered(subprocess: bool) -> None:
    asks = Asks(MicroBatchFinder(subprocess=subprocess), {1: 4, 2: 4, 3: 3, 4: 8, 5: 1000})
    settings: dict[str, Any] = {"train": loader(48), "max_epochs": 1}
    asked, _ = fit([asks], module=Limited(), **settings)
    assert asks.found == {1: (4, 1), 2: (4, 0), 3: (3, 0), 4: (5, 3), 5: (5, 0)}
    alone, _ = fit([], module=Limited(), **settings)
    assert asked.losses == alone.losses
    assert same_weights(asked, alone)


def test_a_ceiling_respects_the_limit_of_ones_own() -> None:
    asks = Asks(MicroBatchFinder(max_micro_batch=6), {1: 100})
    fit([asks], max_epochs=1)
    assert asks.found == {1: (6, 2)}


def test_what_was_found_before_fit_answers_later() -> None:
    finder = MicroBatchFinder()
    asks = Asks(finder, {1: 4, 2: 1000})
    fit([finder, asks], module=Limited(), max_epochs=1)
    assert asks.found == {1: (4, 0), 2: (5, 0)}


def make_sequences(micro_batch: int, length: int) -> Any:
    index = torch.arange(micro_batch)
    return index, torch.ones(micro_batch, 6) * length, torch.zeros(micro_batch, dtype=torch.long)


class Sequences(Classifier):
    """Runs out of memory above 1,000 positions."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 0 and batch[1][0, 0] * len(batch[0]) > 1000:
            raise torch.OutOfMemoryError("made up")
        return super().training_step(batch, batch_idx)


def test_each_length_has_its_ceiling() -> None:
    finder = MicroBatchFinder(
        lengths=[100, 400, 250], make_batch=make_sequences, max_micro_batch=8, tolerance=0
    )
    one_step(finder, Sequences(), train=loader(batch_size=8))
    assert finder.ceilings == {400: 2, 250: 4, 100: 8}
    assert finder.micro_batch == 2
    asked = [(trial.length, trial.micro_batch) for trial in finder.trials]
    longest = [(400, 8), (400, 4), (400, 2), (400, 3)]
    assert asked == [*longest, (250, 4), (250, 8), (250, 6), (250, 5), (100, 8)]


def test_a_function_makes_batches_where_the_loader_cannot() -> None:
    finder = MicroBatchFinder(make_batch=lambda n: make_sequences(n, 1), max_micro_batch=7)
    batches = [make_sequences(2, 1)] * 3
    one_step(finder, Classifier(), train=torch.utils.data.DataLoader(batches, batch_size=None))
    assert (sizes(finder), finder.micro_batch) == ([1, 2, 4, 7], 7)


def saved(tmp_path: Path, module: Classifier) -> Path:
    _, run = fit([MicroBatchFinder()], module=module, train=loader(8), max_epochs=1)
    run.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


def test_a_resumed_run_does_not_search_again(tmp_path: Path) -> None:
    path = saved(tmp_path, Limited())
    finder = MicroBatchFinder()
    fit([finder], module=Limited(), train=loader(8), ckpt_path=str(path))
    assert (finder.micro_batch, finder.trials) == (5, [])
    torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "change",
    [{"precision": "bf16-mixed"}, {"max_memory_bytes": 10**12}, {"memory_fraction": 0.5}],
    ids=str,
)
def test_other_circumstances_are_searched_anew(change: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path, Limited())
    own = {name: change[name] for name in change if name != "precision"}
    finder = MicroBatchFinder(**own)
    settings = {name: change[name] for name in change if name == "precision"}
    fit([finder], module=Limited(), train=loader(8), ckpt_path=str(path), **settings)
    assert len(finder.trials) == 4


def test_another_module_is_searched_anew_and_the_same_is_not() -> None:
    finder, module = MicroBatchFinder(), Limited()
    one_step(finder, module)
    first = len(finder.trials)
    one_step(finder, module)
    assert len(finder.trials) == first
    one_step(finder, type("Smaller", (Limited,), {"limit": 4})())
    assert finder.micro_batch == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_micro_batch": 0}, ValueError, "max_micro_batch was 0"),
        ({"max_micro_batch": 2.0}, TypeError, "max_micro_batch was 2.0"),
        ({"tolerance": 1.0}, ValueError, "tolerance was 1.0"),
        ({"tolerance": math.nan}, ValueError, "tolerance was nan"),
        ({"memory_fraction": 0.0}, ValueError, "memory_fraction was 0.0"),
        ({"memory_fraction": 1.1}, ValueError, "memory_fraction was 1.1"),
        ({"max_memory_bytes": 0}, ValueError, "max_memory_bytes was 0"),
        ({"trial_seconds": 0.0}, ValueError, "trial_seconds was 0.0"),
        ({"subprocess": "yes"}, ValueError, "subprocess was 'yes'"),
        ({"lengths": []}, ValueError, "lengths was empty"),
        ({"lengths": [0], "make_batch": print}, ValueError, "lengths was 0"),
        ({"lengths": [128]}, MisconfigurationException, "needs make_batch="),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MicroBatchFinder(**change)


def test_a_loader_of_whole_batches_is_refused() -> None:
    batches = torch.utils.data.DataLoader([make_sequences(2, 1)], batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"No batch of another size.*make_batch="):
        one_step(MicroBatchFinder(), Classifier(), train=batches)


def test_modules_that_step_by_themselves_are_refused() -> None:
    manual = Classifier()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization is False"):
        one_step(MicroBatchFinder(), manual, accumulate_grad_batches=1)
    without = Classifier()
    without.configure_optimizers = lambda: None
    with (
        pytest.warns(UserWarning, match="this fit will run with no optimizer"),
        pytest.raises(MisconfigurationException, match="there is no optimizer"),
    ):
        one_step(MicroBatchFinder(), without)
