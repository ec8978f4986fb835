"""Accumulation that changes in flight, and what callbacks see, under DeepSpeed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from harness import Classifier, loader, run_distributed
from harness.deepspeed_parts import KNOWN_WARNINGS, Weights, deepspeed, furthest, trained, warm_up
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext._lightning import DeepSpeedView, View, view
from lightning_ext.callbacks import AdaptiveBatchSize

pytestmark = [*KNOWN_WARNINGS, pytest.mark.usefixtures("_warm")]
REFUSED: list[tuple[Any, ...]] = [
    ("save_tensors", {}),
    ("load_tensors", {}, {}),
    ("watch_gradients", [], print),
]
LOGGED = ("global_batch", "accumulate", "samples_seen", "lr_scaled", "clipped_fraction")


@pytest.fixture(scope="module")
def _warm() -> None:
    warm_up()


class Steps(Callback):
    """Remembers what is logged at each step."""

    def __init__(self) -> None:
        self.logged: list[tuple[float, ...]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            metrics = trainer.callback_metrics
            self.logged.append(tuple(float(metrics[name]) for name in LOGGED))


def adaptive(
    strategy: Any, optimizer: str, lr_rule: str
) -> tuple[Weights, list[tuple[float, ...]]]:
    steps = Steps()
    batch = AdaptiveBatchSize("0:8 64:16 128:48", max_micro_batch=8, lr_rule=lr_rule)
    weights, _ = trained(
        strategy,
        2,
        callbacks=[batch, steps],
        module=Classifier(optimizer, dropout=0.0),
        train=loader(101, shuffle=False),
        accumulate_grad_batches=1,
        gradient_clip_val=0.3,
        max_epochs=3,
    )
    return weights, steps.logged


RULES = [("sgd", "auto"), ("sgd", "linear_samples"), ("adamw", "auto")]


def with_every_rule() -> list[tuple[Any, Any]]:
    return [(adaptive("ddp", *rule), adaptive("deepspeed", *rule)) for rule in RULES]


@cache
def scheduled() -> list[list[tuple[Any, Any]]]:
    return run_distributed(with_every_rule)


@pytest.mark.parametrize("rule", RULES, ids="-".join)
def test_a_batch_schedule_runs_as_under_ddp(rule: tuple[str, str]) -> None:
    for rank in scheduled():
        (expected, steps), (weights, same_steps) = rank[RULES.index(rule)]
        assert len({size for size, *_ in steps}) == 3
        assert same_steps == steps
        assert furthest(weights, expected) <= 1e-6


class Change(Callback):
    """Changes the accumulation after some batches; notes refusals, and what the engine has."""

    def __init__(self, changes: dict[int, int]) -> None:
        self.changes = changes
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        seen, batch_idx = view(trainer), args[-1]
        if batch_idx not in self.changes:
            return
        try:
            seen.set_accumulate(self.changes[batch_idx])
        except MisconfigurationException as error:
            self.seen.append(str(error).partition(":")[0])
        engine: Any = trainer.strategy
        self.seen.append(engine.deepspeed_engine.gradient_accumulation_steps())


class Look(Callback):
    """What the view says before a step, and whether the engine knows the ends of windows."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.seen: dict[str, Any] = {}
        self.ends: list[tuple[bool, bool]] = []

    def on_after_backward(self, trainer: Trainer, *args: Any) -> None:
        seen = view(trainer)
        if isinstance(seen, DeepSpeedView):
            ends = not trainer.fit_loop._should_accumulate()
            self.ends.append((ends, seen.engine.is_gradient_accumulation_boundary()))

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        seen = view(trainer)
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(float(seen.sq_norm(gradients)))
        if isinstance(seen, DeepSpeedView):
            self.seen = {
                "ranks": (seen.data_parallel_size, seen.data_parallel_rank, seen.ranks_per_node),
                "parts": float(seen.sq_norm([torch.full((2,), 1.0 + seen.data_parallel_rank)])),
                "columns": seen.sq_norms([torch.ones(2), None, torch.ones(3)], [1, 0, 1]).tolist(),
                "can": (seen.can_set_accumulate, seen.splits_gradients),
                "refused": [_refusal(seen, *call) for call in REFUSED],
            }


def _refusal(seen: View, name: str, *args: Any) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        getattr(seen, name)(*args)
    return str(caught.value)


class Set(Callback):
    """The same changes, set on the Trainer."""

    def __init__(self, changes: dict[int, int]) -> None:
        self.changes = changes

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        present = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = self.changes.get(args[-1], present)


def in_flight() -> Any:
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    looks, change = (Look(), Look()), Change({2: 4, 3: 4, 4: 1, 7: 2})
    expected, _ = trained("ddp", 2, callbacks=[looks[0], Set({3: 4, 7: 2})], **options)
    strategy = deepspeed(ranks_per_node=1)
    weights, run = trained(strategy, 2, callbacks=[looks[1], change], **options)
    norms = [torch.tensor(look.norms) for look in looks]
    apart = furthest(weights, expected)
    return looks[1].seen, change.seen, run.global_step, apart, looks[1].ends, norms


@cache
def changed() -> list[Any]:
    return run_distributed(in_flight)


def test_accumulation_changes_between_windows_in_trainer_and_engine() -> None:
    for _, seen, steps, apart, ends, _ in changed():
        refused = "accumulate_grad_batches cannot change from {} to {} here"
        assert seen == [refused.format(2, 4), 2, 4, refused.format(4, 1), 4, 2]
        assert steps == 2 + 1 + 2
        assert [own for own, _ in ends] == [engine for _, engine in ends]
        assert sum(own for own, _ in ends) == steps
        assert apart <= 1e-6


def test_the_view_knows_ranks_and_adds_up_parts() -> None:
    for rank, (seen, *_) in enumerate(changed()):
        assert seen["ranks"] == (2, rank, 1)
        assert seen["can"] == (True, True)
        assert seen["parts"] == 2 * 1.0 + 2 * 4.0
        assert seen["columns"] == [0.0, 10.0]


def test_the_view_has_the_norm_of_the_engines_gradients() -> None:
    for *_, (by_ddp, by_deepspeed) in changed():
        assert len(by_ddp) == 5
        torch.testing.assert_close(by_deepspeed, by_ddp, rtol=1e-5, atol=0)


def test_the_view_refuses_what_the_engine_keeps() -> None:
    for text in changed()[0][0]["refused"]:
        assert "DeepSpeed's engine keeps parameters and gradients to itself" in text
        assert "Hint: Trainer(strategy='fsdp2')" in text


class CutShort(Classifier):
    """Ends each epoch after the third batch, inside of a window of two."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def cut_short(strategy: Any) -> Weights:
    module = CutShort("unit", dropout=0.0)
    return trained(strategy, 2, module=module, accumulate_grad_batches=2, max_epochs=2)[0]


def cut_short_by_both() -> tuple[Weights, Weights]:
    return cut_short("ddp"), cut_short("deepspeed")


def test_a_window_that_was_cut_short_leaves_no_gradient() -> None:
    for expected, found in run_distributed(cut_short_by_both):
        assert furthest(found, expected) <= 1e-6
