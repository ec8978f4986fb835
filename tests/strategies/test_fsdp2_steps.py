"""What a step of FSDP2 communicates, reduces and clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed, trainer
from harness.fsdp2_parts import by_fsdp2, by_one
from harness.mixed_module import Mixed, batches
from harness.strategy_cases import Weights, distance
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from lightning_ext.callbacks import WireMeter


class Collectives(Callback):
    """Counts what each batch reduces."""

    def __init__(self) -> None:
        self.scattered: list[int] = []
        self.averaged: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.meter = WireMeter(ranks_per_node=1)
        self.meter.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.meter.__exit__(None, None, None)
        count = self.meter.count
        self.scattered.append(count.only(kind="reduce_scatter").calls)
        self.averaged.append(count.only(kind="all_reduce").calls)


def accumulated() -> Any:
    seen = Collectives()
    by_fsdp2(steps=3, callbacks=[seen], limit_train_batches=6)
    return seen.scattered, seen.averaged


def test_each_unit_is_reduced_once_in_a_step_and_the_last_window_counts() -> None:
    # Windows of 4 and 2 batches: two layers and the rest, and one reduction of the scalars.
    for scattered, averaged in run_distributed(accumulated):
        assert scattered == [0, 0, 0, 3, 0, 3, 0, 0, 0, 3]
        assert averaged == [0, 0, 0, 1, 0, 1, 0, 0, 0, 1]


def test_a_cut_last_window_is_that_of_one_process() -> None:
    how: dict[str, Any] = {"steps": 4, "limit_train_batches": 6, "gradient_clip_val": 0.1}
    for found in run_distributed(fitted, args=({}, how)):
        assert distance(found, by_one(**how).weights) <= 1e-12


def fitted(how: dict[str, Any], kwargs: dict[str, Any]) -> Weights:
    return by_fsdp2(how=how, **kwargs).weights


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"wrap": None}, marks=pytest.mark.slow),
        pytest.param({"reshard_after_forward": False}, marks=pytest.mark.slow),
        {"reshard_after_forward": 2},
        {"device_mesh": (2, 2)},
        pytest.param({"device_mesh": (4, 1)}, marks=pytest.mark.slow),
        {"find_unused_parameters": True},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ],
    ids=str,
)
def test_four_ranks_are_one_process_whatever_the_layout(how: dict[str, Any]) -> None:
    kwargs: dict[str, Any] = {"gradient_clip_val": 0.1}
    for found in run_distributed(fitted, 4, args=(how, kwargs)):
        assert distance(found, by_one(**kwargs).weights) <= 1e-12


class Evaluates(Mixed):
    """Evaluates by its training step, and predicts by its forward."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    test_step = validation_step

    def forward(self, words: Any) -> Tensor:
        return super().forward(words if isinstance(words, Tensor) else words[0])


def evaluated(way: str, count: int) -> int:
    limits = {f"limit_{name}_batches": count for name in ("val", "test", "predict")}
    run = trainer(strategy="fsdp2", devices=2, use_distributed_sampler=False, **limits)
    with WireMeter(ranks_per_node=1) as meter:
        getattr(run, way)(Evaluates(), batches())
    return meter.count.only(kind="all_gather", group_size=2, phase="forward").calls


@pytest.mark.parametrize("way", ["validate", "test", "predict"])
def test_an_evaluation_gathers_layers_for_each_batch_and_the_rest_once(way: str) -> None:
    once, thrice = (run_distributed(evaluated, args=(way, count)) for count in (1, 3))
    assert [more - less for less, more in zip(once, thrice, strict=True)] == [2 * 2] * 2


class Careless(Mixed):
    """Calls a part in a hook, with gradients."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.head(torch.ones(1, 10))


def careless() -> None:
    by_fsdp2(Careless(), 1)


def test_a_part_called_with_gradients_outside_of_a_step_is_refused() -> None:
    for end in run_distributed(careless, return_exceptions=True):
        assert isinstance(end, MisconfigurationException)
        assert "head was called outside of the step" in str(end)
        assert "torch.no_grad()" in str(end)


def clipped(algorithm: str) -> Any:
    class Look(Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            # The module has the gathered parameters at this time.
            own = [p for group in optimizer.param_groups for p in group["params"]]
            self.seen = [p.grad for p in own if p.grad is not None]

    look = Look()
    how = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    by_fsdp2(steps=2, callbacks=[look], **how)
    kinds = {isinstance(gradient, DTensor) for gradient in look.seen}
    parts = [x.full_tensor() if isinstance(x, DTensor) else x for x in look.seen]
    every = torch.cat([x.flatten() for x in parts])
    return kinds, every.norm().item(), every.abs().max().item()


def test_the_norm_is_over_all_ranks_and_kinds_of_parameters() -> None:
    for kinds, norm, _ in run_distributed(clipped, args=("norm",)):
        assert kinds == {True, False}
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_no_element_is_larger_than_its_limit() -> None:
    for _, _, largest in run_distributed(clipped, args=("value",)):
        assert largest == 1e-3


class Branches(Mixed):
    """Whose ranks use different parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.other = nn.Linear(10, 10)
        self.bias = nn.Parameter(torch.tensor(0.0))
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        first = not dist.is_initialized() or dist.get_rank() == 0
        x = self.embedding(words).mean(1)
        if self.kind == "parameter" and first:
            x = x + self.other(x)
        if self.kind == "scalar" and first:
            x = x + self.bias
        for index, layer in enumerate(self.layers):
            if not (self.kind == "unit" and first and index == 0):
                x = layer(x)
        if self.kind == "end" and not first:
            x = self.layers[0](x)
        return self.head(x)


def branching(kind: str, find_unused_parameters: bool) -> Weights:
    how = {"find_unused_parameters": find_unused_parameters}
    return by_fsdp2(Branches(kind), 2, how=how).gradients


def test_a_scalar_of_one_rank_counts_zero_on_the_others() -> None:
    one, other = run_distributed(branching, args=("scalar", False))
    assert distance(one, other) == 0
    assert one["bias"] != 0


def test_a_parameter_of_one_rank_counts_zero_on_the_others_if_asked() -> None:
    one, other = run_distributed(branching, args=("parameter", True))
    assert distance(one, other) == 0
    assert one["other.weight"].any()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("unit", "rank 0: layers.1, rank 1: layers.0"),
        ("end", "rank 0: the backward pass, rank 1: layers.0"),
    ],
)
def test_ranks_that_run_other_layers_are_refused(
    kind: str, told: str, find_unused_parameters: bool
) -> None:
    ends = run_distributed(branching, args=(kind, find_unused_parameters), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    assert all(told in str(end) for end in ends)


def test_ranks_that_use_other_parameters_are_refused_unless_asked() -> None:
    ends = run_distributed(branching, args=("parameter", False), return_exceptions=True)
    assert [type(end) for end in ends] == [MisconfigurationException] * 2
    assert all("find_unused_parameters=True" in str(end) for end in ends)


def test_units_are_counted_by_name() -> None:
    for found, module in run_distributed(sizes):
        assert found.keys() == {"", "layers.0", "layers.1"}
        assert found["layers.0"] == module


def sizes() -> Any:
    found: dict[str, int] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            assert isinstance(module, FSDPModule)
            found.update(trainer.strategy.units())

    by_fsdp2(steps=1, callbacks=[Look()])
    own = Mixed().layers[0].parameters()
    return found, sum(p.numel() for p in own if p.ndim)
