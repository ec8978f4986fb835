"""What users of a Trainer see of training by a pipeline: hooks, schedulers, callbacks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_parts import (
    COUNT,
    Chain,
    by_one,
    by_pipeline,
    data,
    distance,
    loaders,
    pipeline_trainer,
    whole,
)
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

EXACT = 1e-12


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    """What was written; only the first rank writes."""
    file = Path(logger.log_dir) / "metrics.csv"
    return list(csv.DictReader(file.open())) if rank_zero_only.rank == 0 else []


class Hooks(Chain):
    """Writes down its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append("on_before_zero_grad")

    def optimizer_zero_grad(self, *args: Any) -> None:
        self.calls.append("optimizer_zero_grad")
        super().optimizer_zero_grad(*args)

    def on_before_backward(self, loss: Tensor) -> None:
        self.calls.append("on_before_backward")

    def on_after_backward(self) -> None:
        self.calls.append("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("on_before_optimizer_step")

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("configure_gradient_clipping")
        super().configure_gradient_clipping(*args, **kwargs)

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        self.calls.append("on_train_batch_end")
        self.outputs = outputs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


def _hooks() -> tuple[list[str], Any]:
    module = Hooks()
    by_pipeline(module, max_epochs=1, limit_train_batches=2, accumulate=2)
    return module.calls, module.outputs


@pytest.fixture(scope="module")
def hooks() -> list[Any]:
    return run_distributed(_hooks)


def test_hooks_of_a_window_are_lightnings(hooks: list[Any]) -> None:
    zero = ["on_before_zero_grad", "optimizer_zero_grad"]
    backward = ["on_before_backward", "on_after_backward"]
    step = ["on_before_optimizer_step", "configure_gradient_clipping"]
    end = ["on_train_batch_end"]
    assert hooks[0][0] == hooks[1][0] == zero + backward + end + backward + step + end


def test_the_loss_of_a_dict_is_the_output_of_the_step_on_all_ranks(hooks: list[Any]) -> None:
    (first, last) = (outputs["loss"] for _, outputs in hooks)
    assert torch.equal(first, last)


class Scheduled(Chain):
    """With a scheduler of its own kind, and several groups."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        layers = [{"params": part.parameters()} for part in (self.first, self.net, self.head)]
        optimizer = torch.optim.SGD(layers, lr=0.1)
        if self.kind == "plateau":
            made: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.5, patience=0, threshold=0.05
            )
            entry = {"scheduler": made, "monitor": "loss"}
        else:
            made = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            entry = {"scheduler": made, "interval": self.kind}
        return {"optimizer": optimizer, "lr_scheduler": entry}

    def on_train_epoch_end(self) -> None:
        (optimizer,) = self.trainer.optimizers
        self.rates.append(optimizer.param_groups[-1]["lr"])


def _scheduled(kind: str) -> tuple[dict[str, Tensor], list[float]]:
    module = Scheduled(kind)
    return by_pipeline(module, max_epochs=3).weights, module.rates


@pytest.mark.parametrize("kind", ["step", "epoch", "plateau"])
def test_schedulers_step_as_in_one_process(kind: str) -> None:
    one = Scheduled(kind)
    weights = by_one(one, max_epochs=3).weights
    for found, rates in run_distributed(_scheduled, args=(kind,)):
        assert rates == pytest.approx(one.rates)
        assert len(set(rates)) > 1
        assert distance(found, weights) < EXACT


def _grown() -> dict[str, Tensor]:
    own = GradientAccumulationScheduler({0: 1, 1: 2})
    return by_pipeline(callbacks=[own]).weights


def test_windows_that_grow_are_those_of_one_process() -> None:
    own = GradientAccumulationScheduler({0: COUNT, 1: 2 * COUNT})
    expected = by_one(accumulate=1, accumulate_grad_batches=1, callbacks=[own]).weights
    for found in run_distributed(_grown):
        assert distance(found, expected) < EXACT


class Odd(Chain):
    """Ties a layer of the first stage to one of the last, and has a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4][0].weight = self.net[0][0].weight
        self.unused = nn.Parameter(torch.ones(2).double())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.no_gradient = [n for n, p in self.named_parameters() if p.grad is None]


def _clipped(how: str, replicas: int, shared: str) -> tuple[dict[str, Tensor], list[str]]:
    module = Odd()
    options = {"data_parallel_size": replicas, "data_parallel": shared}
    clip: dict[str, Any] = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": how}
    fit = by_pipeline(module, options, max_epochs=1, **clip)
    return fit.weights, module.no_gradient


@pytest.mark.parametrize(
    ("how", "world", "shared"),
    [("norm", 2, "ddp"), ("value", 2, "ddp"), ("norm", 4, "fsdp2"), ("value", 4, "ddp")],
)
def test_clipping_sees_tied_and_outer_gradients_once(how: str, world: int, shared: str) -> None:
    clip: dict[str, Any] = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": how}
    expected = by_one(Odd(), max_epochs=1, **clip).weights
    for found, without in run_distributed(_clipped, world, args=(how, world // 2, shared)):
        assert distance(found, expected) < EXACT
        assert without == ["unused"]


def _stop() -> dict[str, Any]:
    return {"max_epochs": 9, "callbacks": [EarlyStopping("val_loss", mode="max", patience=2)]}


def _stopped() -> tuple[int, float]:
    run = pipeline_trainer(accumulate_grad_batches=1, **_stop())
    run.fit(Chain(), *loaders())
    return run.current_epoch, float(run.callback_metrics["val_loss"])


def test_all_ranks_stop_early_where_one_process_does() -> None:
    run = trainer(accumulate_grad_batches=COUNT, **_stop())
    run.fit(Chain(), DataLoader(data(), 4), DataLoader(data(), 16))
    expected = run.current_epoch, pytest.approx(float(run.callback_metrics["val_loss"]))
    assert run.current_epoch < 9
    assert run_distributed(_stopped) == [expected, expected]


class Watched(Chain):
    """With an example of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 6).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss, prog_bar=True)
        return loss


def _watched(folder: str, rich: bool) -> tuple[Any, ...]:
    summary, logger = ModelSummary(max_depth=2), CSVLogger(folder)
    bar: Any = RichProgressBar() if rich else TQDMProgressBar()
    show = {"enable_progress_bar": True, "enable_model_summary": True, "log_every_n_steps": 1}
    callbacks = [LearningRateMonitor(), summary, bar]
    run, module = pipeline_trainer(logger=logger, callbacks=callbacks, **show), Watched()
    run.fit(module, *loaders())
    rates = [float(row["lr-AdamW"]) for row in _rows(logger) if row["lr-AdamW"]]
    shown: Any = bar.get_metrics(run, module)
    return rates, summary._summary(run, module).total_parameters, shown["shown"]


@pytest.mark.filterwarnings("ignore:.*install .ipywidgets:UserWarning")
@pytest.mark.parametrize("rich", [False, True])
def test_bars_summaries_and_monitors_work_on_all_ranks(rich: bool, tmp_path: Path) -> None:
    first, last = run_distributed(_watched, args=(str(tmp_path), rich))
    assert set(first[0]) == {1e-2}
    assert first[2] == last[2]
    total, outside = sum(p.numel() for p in Chain().parameters()), 6 * 10 + 10 + 10 * 3 + 3
    assert first[1] + last[1] == total + outside  # each shows its own stages and what is outside


def _twice() -> tuple[dict[str, Tensor], list[Any]]:
    run, module = pipeline_trainer(accumulate_grad_batches=1, max_epochs=1), Chain()
    module.test_step = module.validation_step  # type: ignore[method-assign]  # the same steps
    run.fit(module, DataLoader(data(), 32))
    run.fit_loop.max_epochs = 2
    run.fit(module, DataLoader(data(), 4))
    return whole(module), run.test(module, loaders()[1], verbose=False)


def test_a_trainer_fits_twice_and_tests() -> None:
    # the second fit is free to have other micro-batches
    one, run = Chain(), trainer(accumulate_grad_batches=COUNT, max_epochs=1)
    one.test_step = one.validation_step  # type: ignore[method-assign]  # the same steps
    run.fit(one, DataLoader(data(), 8))
    run.fit_loop.max_epochs = 2
    run.fit(one, DataLoader(data(), 1))
    expected = run.test(one, DataLoader(data(), 16), verbose=False)
    for weights, tested in run_distributed(_twice):
        assert distance(weights, whole(one)) < EXACT
        assert tested[0] == pytest.approx(expected[0], rel=1e-12)
