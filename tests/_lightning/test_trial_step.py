"""Training steps of which nothing stays."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import Classifier, fit, identical, loader
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_ext._lightning import batch_maker
from lightning_ext._lightning._trial_step import state_restored, try_training


class Busy(Classifier):
    """Batch norm, dropout, all generators, attributes that change, and a tensor that does."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.norm = nn.BatchNorm1d(6)
        self.calls = 0
        self.running = torch.zeros(1)
        self.noted: dict[str, list[float]] = {"random": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x, y = batch
        self.calls += 1
        self.running += 1
        self.noted["random"].append(random.random() + np.random.rand())
        if self.calls == 2:
            self.late = "set once"
        loss = super().training_step((index, self.norm(x), y), batch_idx)
        self.log("noise", self.noted["random"][-1])
        return loss


class Try(Callback):
    """Trains on trial at the start, and after every optimizer step."""

    def __init__(self, during: Callable[[Any], None] = lambda run: None) -> None:
        self.during = during

    def trial(self, run: Any) -> None:
        make = batch_maker(run)
        with state_restored(run):
            try_training(run, lambda: make(7))
            self.during(run)

    def on_train_start(self, run: Any, module: Any) -> None:
        self.trial(run)

    def on_train_batch_end(self, run: Any, *args: Any) -> None:
        if not run.fit_loop._should_accumulate():
            self.trial(run)


def history(callbacks: list[Callback], **settings: Any) -> Any:
    """Everything that a fit leaves behind, the next random number included."""
    module, run = fit(callbacks, **settings)
    attributes = (module.calls, module.noted, module.running, module.late, module.seen)
    optimizer = run.optimizers[0].state_dict()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    logged = run.callback_metrics, run.logged_metrics, run.global_step
    after = torch.rand(2), random.random(), np.random.rand()
    return dict(module.state_dict()), module.losses, attributes, optimizer, gradients, logged, after


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_is_bitwise_the_same_with_trials_in_between(
    optimizer: str, accumulate: int, precision: str
) -> None:
    settings: dict[str, Any] = {
        "train": loader(24),
        "accumulate_grad_batches": accumulate,
        "precision": precision,
        "gradient_clip_val": 0.1,
    }
    tried = history([Try()], module=Busy(optimizer), **settings)
    alone = history([], module=Busy(optimizer), **settings)
    assert identical(tried, alone)


def test_trials_do_change_what_they_give_back() -> None:
    changed: list[bool] = []
    weights: list[Tensor] = []

    def note(run: Any) -> None:
        weight = run.lightning_module.net[0].weight
        changed.append(not torch.equal(weight, weights[-1]))

    class Before(Try):
        def trial(self, run: Any) -> None:
            weights.append(run.lightning_module.net[0].weight.detach().clone())
            super().trial(run)

    fit([Before(note)], train=loader(8), max_epochs=1)
    assert changed == [True, True]


def test_gradients_and_optimizer_state_are_there_when_it_counts() -> None:
    seen: list[tuple[int, bool]] = []

    class Look(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            state = self.trainer.optimizers[0].state
            seen.append((len(state), self.net[0].weight.grad is not None))
            return super().training_step(batch, batch_idx)

    fit([Try()], module=Look(), train=loader(4), max_epochs=1, accumulate_grad_batches=1)
    at_the_start = [(0, False), (4, True)]
    training, after_the_step = [(0, False)], [(4, True)]
    assert seen == at_the_start + training + after_the_step


def test_no_hook_runs() -> None:
    called: list[str] = []

    class Hooked(Classifier):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            called.append("zero_grad")

        def on_before_backward(self, loss: Any) -> None:
            called.append("backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            called.append("step")

    class Watch(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            run.optimizers[0].register_step_post_hook(lambda *_: called.append("stepped"))

        def on_after_backward(self, run: Any, module: Any) -> None:
            called.append("after")

    fit([Watch(), Try()], module=Hooked(), train=loader(4), max_epochs=1, accumulate_grad_batches=1)
    assert called == ["zero_grad", "backward", "after", "step", "stepped"]


def test_the_batch_takes_the_way_of_the_loaders() -> None:
    way: list[str] = []

    class Transfer(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            way.append("before")
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            way.append("after")
            return batch

    fit([Try()], module=Transfer(), train=loader(4), limit_train_batches=1, max_epochs=1)
    assert way == ["before", "after"] * 4  # two at the start, in training, after the step


def test_precision_and_arguments_are_those_of_training() -> None:
    seen: list[bool] = []

    class WithoutIndex(Classifier):
        def training_step(self, batch: Any) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().training_step(batch, 0)

    settings: dict[str, Any] = {"train": loader(4), "max_epochs": 1}
    fit([Try()], module=WithoutIndex(), precision="bf16-mixed", **settings)
    assert seen == [True] * 4


def test_nothing_reaches_a_logger(tmp_path: Any) -> None:
    class Writes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.log_metrics({"written": 1.0})
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    written: list[int] = []
    look = Try(lambda run: written.append(len(logger.experiment.metrics)))
    fit([look], module=Writes(), train=loader(4), max_epochs=1, logger=logger)
    assert written[0] == 0


def test_an_optimizer_that_ran_out_of_memory_halfway_is_whole_again() -> None:
    class Halfway(torch.optim.Adam):
        full = True

        def step(self, closure: Any = None) -> Any:
            closure()
            first = self.param_groups[0]["params"][0]
            self.state[first]["step"] = torch.tensor(1.0)
            if self.full:
                raise torch.OutOfMemoryError("made up")
            return super().step()

    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            return Halfway(self.parameters())

    class Start(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            optimizer, make = run.optimizers[0], batch_maker(run)
            with state_restored(run) as restore:
                with pytest.raises(torch.OutOfMemoryError):
                    try_training(run, lambda: make(4))
                assert optimizer.state
                restore()
                assert not optimizer.state
            run.should_stop = True

    fit([Start()], module=Module(), train=loader(4), max_epochs=1, limit_train_batches=1)


def test_a_gradient_scaler_is_left_out() -> None:
    def scaled(*callbacks: Callback) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        module, _ = fit(list(callbacks), module=Classifier(), train=loader(16), plugins=[plugin])
        return module.losses, dict(module.state_dict()), scaler.state_dict()

    assert identical(scaled(Try()), scaled())
