"""What a pipeline takes for a loss and its backward pass, and what it refuses, by one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_distributed
from harness.pipeline_faults import Own
from harness.pipeline_parts import (
    Chain,
    Fit,
    by_one,
    by_pipeline,
    distance,
    loaders,
    pipeline_trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

EXACT = 1e-12


class Penalized(Chain):
    """Adds the squares of some of its parameters to the loss."""

    def __init__(self, of: Callable[[Chain], Any]) -> None:
        super().__init__("sgd")
        self.of = of

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.05 * sum(p.pow(2).sum() for p in self.of(self))


class Kept(Chain):
    """Its last layer keeps a loss of its own."""

    def __init__(self) -> None:
        super().__init__("sgd")
        inner = self.net[4]

        def keep(x: Tensor) -> Tensor:
            found = inner(x)
            self.net[4].kept = found.pow(2).mean()
            return found

        self.net[4] = Own(keep, inner)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.net[4].kept


class Unfrozen(Chain):
    """Trains its head and the last layers in the first epoch, all of it in the next ones."""

    def __init__(self) -> None:
        super().__init__("sgd")
        for one in (self.first, *self.net[:3]):
            one.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net.requires_grad_(self.current_epoch > 0)
        self.net[3:].requires_grad_(True)


class Backward(Chain):
    """Has a backward pass of its own."""

    def backward(self, loss: Tensor) -> None:
        (2 * loss).backward()


class Drawing(Chain):
    """Draws before the layers and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def pipeline_inputs(self, batch: Any) -> Tensor:
        """Of one micro-batch."""
        self.drawn.append(float(torch.rand(())))
        return self.first(batch[0])

    def pipeline_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Of one micro-batch."""
        self.drawn.append(float(torch.rand(())))
        return F.cross_entropy(self.head(output), batch[1])


class Telling(Drawing):
    """Logs before the layers."""

    def pipeline_inputs(self, batch: Any) -> Tensor:
        self.log_dict({"mean": batch[0].mean()})
        return super().pipeline_inputs(batch)


class Scaling(Callback):
    """Multiplies the loss in place."""

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        loss.mul_(2)


TAKEN: dict[str, Callable[[], Chain]] = {
    "a penalty outside": lambda: Penalized(lambda m: [*m.head.parameters(), m.first.weight]),
    "what the last stage keeps": Kept,
    "layers that are trained later": Unfrozen,
}
REFUSED: dict[str, tuple[Callable[[], Chain], dict[str, Any], str]] = {
    "a penalty on all": (
        lambda: Penalized(Chain.parameters),
        {},
        r"loss reads net\.\S+, .* of the split submodule.*Hint: weight_decay.*NormLoss.*rank 1",
    ),
    "a penalty on a layer": (
        lambda: Penalized(lambda m: [m.net[4][0].weight]),
        {},
        r"loss reads net\.4\.0\.weight of",
    ),
    "a backward pass": (Backward, {}, r"Backward has a backward\(\) of its own, which Pipeline"),
    "a scaled loss": (Chain, {"callbacks": [Scaling()]}, "on_before_backward changed the loss fr"),
    "logs before the layers": (Telling, {}, "pipeline_inputs logs 'mean'.*Hint: self.log in pip"),
}


def told(name: str, options: dict[str, Any]) -> str:
    make, how, _ = REFUSED[name]
    with pytest.raises(MisconfigurationException) as caught:
        by_pipeline(make(), options, **how)
    return str(caught.value)


class Found(NamedTuple):
    """Of a rank."""

    fits: dict[str, Fit]
    refusals: dict[str, str]
    drawn: list[float]


def found() -> Found:
    options = {"stages_per_rank": 1}
    refusals = {name: told(name, options) for name in REFUSED}
    drawing = Drawing()
    by_pipeline(drawing, max_steps=1)
    return Found(
        {name: by_pipeline(make(), options) for name, make in TAKEN.items()},
        refusals,
        drawing.drawn,
    )


@pytest.fixture(scope="module")
def ranks() -> list[Found]:
    return run_distributed(found)


@pytest.mark.parametrize("name", TAKEN)
def test_such_a_module_trains_as_in_one_process(name: str, ranks: list[Found]) -> None:
    expected = by_one(TAKEN[name]()).weights
    assert all(distance(one.fits[name].weights, expected) < EXACT for one in ranks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_trained_wrongly_is_refused(name: str, ranks: list[Found]) -> None:
    for one in ranks:
        assert re.search(REFUSED[name][2], one.refusals[name]), one.refusals[name]


def test_what_is_before_the_layers_draws_other_numbers_than_the_loss(ranks: list[Found]) -> None:
    before, after = (one.drawn for one in ranks)
    assert before
    assert not {*before} & {*after}


def penalized_alone() -> Fit:
    return by_pipeline(Penalized(Chain.parameters), {"stages_per_rank": 2})


def test_one_rank_with_all_stages_may_have_a_penalty_on_all() -> None:
    expected = by_one(Penalized(Chain.parameters)).weights
    (fit,) = run_distributed(penalized_alone, 1)
    assert distance(fit.weights, expected) < EXACT


def in_replicas(how: str) -> tuple[str, Fit]:
    options = {"data_parallel": how, "data_parallel_size": 2, "stages_per_rank": 1}
    return told("a penalty on all", options), by_pipeline(Unfrozen(), options)


@pytest.mark.parametrize("how", ["fsdp2", "ddp"])
def test_replicas_refuse_and_unfreeze_alike(how: str) -> None:
    expected = by_one(Unfrozen()).weights
    for refusal, fit in run_distributed(in_replicas, 4, args=(how,)):
        assert re.search(REFUSED["a penalty on all"][2], refusal)
        assert distance(fit.weights, expected) < EXACT


def evaluated_after() -> list[bool]:
    module, run = Unfrozen(), pipeline_trainer({"stages_per_rank": 1}, accumulate_grad_batches=1)
    run.fit(module, *loaders())
    run.validate(module, loaders()[1], verbose=False)
    run.fit_loop.max_epochs = 3
    run.fit(module, *loaders())
    return [run.current_epoch == 3, *(p.requires_grad for p in module.net.parameters())]


def test_layers_that_were_unfrozen_may_be_evaluated_and_trained_further() -> None:
    assert all(all(found) for found in run_distributed(evaluated_after))
