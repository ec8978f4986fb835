"""Ranks that use different parameters of a unit, in the first step or in a later one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from harness.fsdp2_parts import by_fsdp2, by_one
from harness.strategy_cases import Case, Weights, distance, trained
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_ext.strategies import ZeroPPStrategy

# By its kind, what a rank uses in a step.
USES: dict[str, Any] = {
    "its own": lambda rank, step: {rank},
    "its own later": lambda rank, step: {rank} if step else {0, 1},
    "fewer later": lambda rank, step: {0} if step and rank else {0, 1},
    "more later": lambda rank, step: {0, 1} if step and rank else {0},
    "all": lambda rank, step: {0, 1},
}


class Experts(LightningModule):
    """Two of equal shape behind a layer, all in one unit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.kind = kind
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Every expert in use sees all of a batch."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        x = self.first(batch[0].double())
        used = USES[self.kind](rank, self.global_step)
        return sum((self.experts[one](x).square().mean() for one in used), x.square().mean())

    def configure_optimizers(self) -> Any:
        """Over all."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(kind: str, how: dict[str, Any]) -> Weights:
    return by_fsdp2(Experts(kind), 3, how=how, accumulate_grad_batches=2).weights


def test_parameters_of_equal_shape_are_told_apart_in_the_first_step() -> None:
    ends = run_distributed(fit, args=("its own", {}), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    for end, name in zip(ends, ("experts.1.weight", "experts.0.weight"), strict=True):
        assert f"here not on {name}. Hint: FSDP2Strategy(find_unused_par" in str(end)


@pytest.mark.parametrize("kind", ["its own later", "fewer later", "more later"])
def test_a_rank_that_uses_others_later_says_which(kind: str) -> None:
    ends = run_distributed(fit, args=(kind, {}), return_exceptions=True)
    assert all(isinstance(end, Exception) for end in ends)
    assert isinstance(ends[1], MisconfigurationException)
    told = "experts.0.weight" if kind == "its own later" else "experts.1.weight"
    assert f"other parameters of the outermost unit than before ({told})" in str(ends[1])


def test_ranks_may_do_so_if_asked() -> None:
    one, other = run_distributed(fit, args=("its own later", {"find_unused_parameters": True}))
    assert distance(one, other) == 0


def by_zeropp() -> None:
    strategy: dict[str, Any] = {"ranks_per_node": 1, "hpz": False}
    trained(Case(lambda world: ZeroPPStrategy(**strategy)), Experts("its own"), 1)


def test_the_hint_names_the_strategy_itself() -> None:
    ends = run_distributed(by_zeropp, return_exceptions=True)
    assert all("Hint: ZeroPPStrategy(find_unused_parameters=True)" in str(end) for end in ends)


class Freeze(Callback):
    """Has an expert trained in every second step only."""

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        module.experts[1].requires_grad_(trainer.global_step % 2 == 1)


class FreezeOther(Callback):
    """Freezes another expert on each rank, after the first step."""

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        module.experts[trainer.global_rank].requires_grad_(trainer.global_step == 0)


def frozen(freeze: Callback) -> Weights:
    callbacks = [freeze]
    return by_fsdp2(Experts("all"), 4, callbacks=callbacks, accumulate_grad_batches=2).weights


def test_freezing_and_unfreezing_is_no_change() -> None:
    kwargs: dict[str, Any] = {"callbacks": [Freeze()], "accumulate_grad_batches": 2}
    truth = by_one(Experts("all"), 4, **kwargs).weights
    for found in run_distributed(frozen, args=(Freeze(),)):
        assert distance(found, truth) <= 1e-12


def test_ranks_agree_anew_on_what_is_frozen_later() -> None:
    ends = run_distributed(frozen, args=(FreezeOther(),), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    assert all("losses of ranks depend on different parameters" in str(end) for end in ends)


class Halves(Experts):
    """Alternating losses, each of another unit, without a frozen parameter."""

    def __init__(self) -> None:
        super().__init__("all")
        self.automatic_optimization = False
        self.ends = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Steps one of two optimizers, whose loss leaves the other's unit out."""
        index = batch_idx % 2
        optimizer: Any = self.optimizers()[index]
        optimizer.zero_grad()
        self.manual_backward(self.ends[index](batch[0].double()).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        """One for each end."""
        return [torch.optim.SGD(end.parameters(), lr=0.01) for end in self.ends]


def alternating() -> Weights:
    return by_fsdp2(Halves(), 6, accumulate_grad_batches=1).weights


def test_units_that_a_step_leaves_out_are_no_change() -> None:
    truth = by_one(Halves(), 6, accumulate_grad_batches=1).weights
    for found in run_distributed(alternating):
        assert distance(found, truth) <= 1e-12
