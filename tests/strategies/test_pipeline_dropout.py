"""Random numbers of a pipeline are those of layer, micro-batch and step, wherever a layer runs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import (
    COUNT,
    Chain,
    by_one,
    by_pipeline,
    distance,
    loaders,
    pipeline_trainer,
)
from torch import Tensor, nn

from lightning_ext.strategies._pipeline._random import OUTSIDE, layer_seed, seeded

SEED = 5
CPU = torch.device("cpu")


class Dropped(Chain):
    """Drops units of its layers, and some before them."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes."""
        return self.head(self.net(nn.functional.dropout(self.first(x), 0.2, self.training)))

    def on_train_batch_start(self, *args: Any) -> None:
        self.state = torch.get_rng_state()

    def on_train_batch_end(self, *args: Any) -> None:
        self.still = torch.equal(self.state, torch.get_rng_state())


class Seeded(Dropped):
    """Runs each layer of each micro-batch under the seed that a pipeline gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.within: list[AbstractContextManager[None]] = []
        for index, layer in enumerate(self.net):
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda *_: self._leave())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._enter(OUTSIDE)
        loss = super().training_step(batch, batch_idx)
        self._leave()
        return loss

    def _enter(self, layer: int) -> None:
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        step, micro_batch = divmod(done, COUNT)
        if self.training:
            self.within.append(seeded(layer_seed(SEED, 0, step, micro_batch, layer), CPU))
            self.within[-1].__enter__()

    def _leave(self) -> None:
        if self.training:
            self.within.pop().__exit__(None, None, None)


def _fit(options: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
    torch.manual_seed(SEED)
    module = Dropped()
    return by_pipeline(module, options).weights, module.still


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    return by_one(Seeded()).weights


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"stages_per_rank": 2}),
        (2, {"schedule": "1f1b"}),
        (1, {"stages_per_rank": 4}),
        (2, {"stages_per_rank": 2, "activation_checkpointing": True}),
    ],
)
def test_a_pipeline_drops_what_one_process_drops_under_the_same_seeds(
    world: int, options: dict[str, Any], one: dict[str, Tensor]
) -> None:
    for weights, _ in run_distributed(_fit, world, args=(options,)):
        assert distance(weights, one) < 1e-12


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    return run_distributed(_fit, args=({},))


def test_recomputed_activations_are_bitwise_the_same(plain: list[Any]) -> None:
    again = run_distributed(_fit, args=({"activation_checkpointing": True},))
    for (one, _), (other, _) in zip(plain, again, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_step_leaves_the_global_generator_where_it_was(plain: list[Any]) -> None:
    assert [still for _, still in plain] == [True, True]


def _resumed(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = []
    for epochs in ([2], [1, 2]):
        for last in epochs:
            torch.manual_seed(SEED)
            module, run = Dropped(), pipeline_trainer(max_epochs=last, default_root_dir=folder)
            file = f"{folder}/half.ckpt"
            run.fit(module, *loaders(), ckpt_path=file if epochs == [1, 2] and last == 2 else None)
            if last == 1:
                run.save_checkpoint(file)
        found.append({n: p.detach().clone() for n, p in module.named_parameters()})
    return found[0], found[1]


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path: Any) -> None:
    for whole, resumed in run_distributed(_resumed, args=(str(tmp_path),)):
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Noisy(Chain):
    """Draws in evaluation, too, twice in a step."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        self.net.train()
        return self(batch[0]), self(batch[0]), torch.rand(1)


def _predicted() -> list[Any]:
    torch.manual_seed(int(os.environ["RANK"]))
    run = pipeline_trainer(max_epochs=1)
    found = run.predict(Noisy(), loaders()[1])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def predicted() -> list[Any]:
    return run_distributed(_predicted)


def test_two_calls_in_one_step_of_evaluation_draw_anew(predicted: list[Any]) -> None:
    one, other, _ = predicted[0][0]
    assert not torch.equal(one, other)


def test_ranks_of_a_pipeline_draw_alike_outside_of_the_stages(predicted: list[Any]) -> None:
    first, last = predicted
    assert all(torch.equal(a, b) for a, b in zip(first[0], last[0], strict=True))


def test_seeds_tell_apart_all_that_they_are_made_of() -> None:
    places = [[int(i == j) for j in range(6)] for i in range(7)]
    assert len({layer_seed(*place) for place in places}) == len(places)
