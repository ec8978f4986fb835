"""Callbacks under FSDP2Strategy, which reduces in the last micro-batch: two ranks are one process.

The module does not shard itself. One layer is a unit, the other is gathered with the module, and so
is a vector that belongs to no layer; a number cannot be cut and stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import Classifier, dataset, fit, fsdp2_strategy, identical, loader, run_distributed
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils.data import DataLoader, RandomSampler

from lightning_ext._lightning import holds_unreduced
from lightning_ext.callbacks import (
    AGVM,
    EMA,
    AdamInstabilityMonitor,
    AdaptiveBatchSize,
    AdaptiveGradientClipping,
    GradientNoiseScale,
    GradientNormRecorder,
    LargeBatchRecipe,
    NormLoss,
    PolyakLoss,
    SharpnessAware,
    WeightDistance,
)
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import PolyakSGD


class Mixed(Classifier):
    """Float64, a parameter group for matrices and one for the rest."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer, dropout=0.0)
        self.factor = Parameter(torch.tensor(1.5))
        self.shift = Parameter(torch.tensor([0.1, 0.2, -0.3]))
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x, y = batch
        self.seen.append(index.tolist())
        return nn.functional.cross_entropy(self.factor * self.net(x) + self.shift, y)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        groups = [{"params": matrices}, {"params": [p for p in self.parameters() if p.ndim < 2]}]
        if self.chosen == "polyak":
            return PolyakSGD(groups, lr=0.5, momentum=0.5)
        if self.chosen == "adamw":
            return torch.optim.AdamW(groups, lr=1e-2)
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class Batches(Callback):
    """The global batch of every step."""

    def __init__(self) -> None:
        self.sizes: list[float] = []

    def on_train_batch_end(self, run: Any, *args: Any) -> None:
        if not run.fit_loop._should_accumulate():
            self.sizes.append(run.callback_metrics["global_batch"].item())


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def averages(ema: Any) -> Any:
    return [whole(x) for x in ema._average._tensors.values()]


def history(callback: Any) -> Tensor:
    found: Tensor = callback.state_dict()["history"]
    return found


class Case(NamedTuple):
    """A callback in a run: with which optimizer and batches, and what is to be the same."""

    make: Callable[[], Callback]
    read: Callable[[Any], Any] | None = None
    optimizer: str = "sgd"
    rule: str = "0:16"


GROWS = "0:16 60:48 150:32"
CASES = {
    "EMA": Case(lambda: EMA(0.9), averages, rule=GROWS),
    "AdaptiveBatchSize": Case(lambda: GradientNoiseScale(1), history, rule="noise_scale"),
    "GradientNoiseScale": Case(
        lambda: GradientNoiseScale(1, geometry="euclidean", per_group=True), history, "adamw"
    ),
    "SharpnessAware": Case(lambda: SharpnessAware(0.1), lambda one: one.steps, rule=GROWS),
    "ASAM": Case(lambda: SharpnessAware(1.0, adaptive=True), lambda one: one.steps),
    "AdaptiveGradientClipping": Case(lambda: AdaptiveGradientClipping(0.02)),
    "NormLoss": Case(lambda: NormLoss(0.1)),
    "GradientNormRecorder": Case(
        GradientNormRecorder, lambda one: torch.tensor(one._steps, dtype=torch.float64), "adamw"
    ),
    "WeightDistance": Case(lambda: WeightDistance(2), history, "adamw"),
    "AdamInstabilityMonitor": Case(lambda: AdamInstabilityMonitor(2), history, "adamw"),
    "AGVM": Case(lambda: AGVM(2, warmup_steps=2), lambda one: one.multipliers),
    "PolyakLoss": Case(PolyakLoss, optimizer="polyak"),
    "LargeBatchRecipe": Case(
        lambda: LargeBatchRecipe(reference_batch=8),
        lambda one: {each.topic: len(each.found) for each in one.advice},
        rule="0:8 40:64",
    ),
}


def train(name: str, ranks: int, accumulate: int, options: dict[str, Any]) -> Any:
    """Weights, the batch of every step, and what the callback has found."""
    case = CASES[name]
    data = dataset(101 if case.rule == GROWS else 96, torch.float64)
    train = DataLoader(data, batch_sampler=AdaptiveBatchSampler(RandomSampler(data), 4, seed=5))
    ruled = {"max_global_batch": 96, "dwell_samples": 32, "threshold": 0.01}
    batches, callback = Batches(), case.make()
    adaptive = AdaptiveBatchSize(
        case.rule, max_micro_batch=8, **({} if ":" in case.rule else ruled)
    )
    module, _ = fit(
        [adaptive, callback, batches],
        module=Mixed(case.optimizer),
        train=train,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        **(fsdp2_strategy(ranks, **options) if ranks > 1 else {}),
    )
    weights = torch.cat([whole(p).flatten() for p in module.parameters()])
    return weights, batches.sizes, case.read(callback) if case.read else None


def check(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    assert found[1] == expected[1]
    if expected[2] is not None:
        torch.testing.assert_close(found[2], expected[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(name: str) -> None:
    expected = train(name, 1, 4, {})
    assert (len(set(expected[1])) > 1) == (CASES[name].rule != "0:16")
    for found in run_distributed(train, args=(name, 2, 2, {})):
        check(found, expected)


@pytest.mark.parametrize(
    "name",
    ["GradientNoiseScale", "SharpnessAware", pytest.param("NormLoss", marks=pytest.mark.slow)],
)
def test_four_ranks_with_replicas_are_one_process(name: str) -> None:
    options = {"device_mesh": (2, 2), "reshard_after_forward": False}
    expected = train(name, 1, 8, {})
    for found in run_distributed(train, 4, args=(name, 4, 2, options)):
        check(found, expected)


def measured(epochs: int, folder: Path, resume: bool) -> Any:
    noise, distance = GradientNoiseScale(1), WeightDistance(1)
    module, run = fit(
        [AdaptiveBatchSize("0:16 60:32"), noise, distance],
        module=Mixed("adamw"),
        train=DataLoader(dataset(96, torch.float64), batch_size=4),
        max_epochs=epochs,
        ckpt_path=str(folder / "half") if resume else None,
        **fsdp2_strategy(2),
    )
    if epochs == 1:
        run.save_checkpoint(folder / "half")
    weights = torch.cat([whole(p).flatten() for p in module.parameters()])
    return weights, history(noise), history(distance)


def interrupted(folder: Path) -> Any:
    measured(1, folder, resume=False)
    return measured(2, folder, resume=True), measured(2, folder, resume=False)


def test_what_is_measured_goes_through_a_checkpoint(tmp_path: Path) -> None:
    for found, expected in run_distributed(interrupted, args=(tmp_path,)):
        assert identical(found, expected)


class Validated(Mixed):
    """Its evaluations come in the middle of windows."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[1])


def evaluated(ranks: int) -> Tensor:
    data = dataset(96, torch.float64)
    train = DataLoader(data, batch_sampler=AdaptiveBatchSampler(RandomSampler(data), 4, seed=5))
    module, _ = fit(
        [AdaptiveBatchSize("0:16"), EMA(0.5)],
        module=Validated("sgd"),
        train=train,
        val=DataLoader(data, batch_size=48),
        val_check_interval=3,
        accumulate_grad_batches=4 // ranks,
        **(fsdp2_strategy(ranks) if ranks > 1 else {}),
    )
    return torch.cat([whole(p).flatten() for p in module.parameters()])


def test_the_average_in_the_module_leaves_gradients_that_wait_alone() -> None:
    for found in run_distributed(evaluated, args=(2,)):
        torch.testing.assert_close(found, evaluated(1), rtol=0, atol=1e-12)


class Stop(Callback):
    """In the middle of a window."""

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
        run.should_stop = i == 2
        self.held = holds_unreduced(module)


def stopped() -> tuple[bool, bool]:
    stop, module = Stop(), Mixed("sgd")
    fit([stop], module=module, train=loader(dtype=torch.float64), **fsdp2_strategy(2))
    return stop.held, holds_unreduced(module)


def test_a_run_that_stops_in_a_window_leaves_no_gradient_to_the_next() -> None:
    assert run_distributed(stopped) == [(True, False)] * 2
