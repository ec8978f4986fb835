"""The contract of the room, for parts that stand beside an optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import assert_accurate, run_distributed
from harness.optimizer_cases import CASES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler

from lightning_ext import optim
from lightning_ext.optim import (
    BatchScaling,
    LEGWWarmup,
    PowerScheduler,
    RefinedSchedule,
    SampleCosine,
    SampleLinear,
    SampleOneCycle,
    SampleSchedule,
    SampleWarmup,
    SampleWSD,
    WeightDecaySchedule,
    base_optimizer,
    batch_rule,
    param_groups_for,
    sample_schedules,
)
from lightning_ext.scaling import FactorTable

STEPS = 12
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
}


@dataclass(frozen=True)
class Contract:
    """A part is attached to an optimizer, works after each step, and may have a state."""

    attach: Callable[[Optimizer, Any], Any]
    after_step: Callable[[Any, int], object] = lambda part, step: None
    state: Callable[[Any], Any] = lambda part: None


def _scaling(optimizer: Optimizer, state: Any) -> BatchScaling:
    kappa, lr_factor = state or (1.0, 1.0)
    scaling = BatchScaling(optimizer, kappa=kappa)
    scaling.set_lr_factor(lr_factor)
    return scaling


def _set_kappa(scaling: BatchScaling, step: int) -> None:
    scaling.set_kappa({3: 4.0, 8: 0.5, 10: 1.0}.get(step, scaling.kappa))
    scaling.set_lr_factor(0.5 if step in (1, 2, 6) else 1.0)


def _halving(samples: int) -> float:
    return 0.5 ** (samples / 64)


def _schedule(optimizer: Optimizer, state: Any) -> SampleSchedule:
    schedule = SampleSchedule(optimizer, _halving, samples_per_step=8)
    schedule.load_state_dict(state or {})
    return schedule


def _count(schedule: SampleSchedule, step: int) -> None:
    schedule.samples_per_step = 8 if step < 5 else 24
    schedule.step()


def _nested(optimizer: Optimizer, state: Any) -> SampleSchedule:
    (found,) = sample_schedules(ChainedScheduler([_schedule(optimizer, state)]))
    return found


def _named(make: Callable[..., SampleSchedule], *args: Any, **kwargs: Any) -> Contract:
    def attach(optimizer: Optimizer, state: Any) -> SampleSchedule:
        schedule = make(optimizer, *args, **kwargs, samples_per_step=8)
        schedule.load_state_dict(state or {})
        return schedule

    return Contract(attach, _count, lambda schedule: schedule.state_dict())


def _power(optimizer: Optimizer, **kwargs: Any) -> PowerScheduler:
    for group in optimizer.param_groups:
        group["lr"] *= 10  # the first group's is 1.0, as the law wants it
    return PowerScheduler(optimizer, tokens_per_sample=1, a=0.05, lr_max=0.1, **kwargs)


def _weight_decay(optimizer: Optimizer, **kwargs: Any) -> WeightDecaySchedule:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    return WeightDecaySchedule(optimizer, {0: 0.1, 48: 0.0, 80: 0.05}, **kwargs)


def _grouped(optimizer: Optimizer, state: Any) -> list[dict[str, Any]]:
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    return param_groups_for(torch.nn.ParameterList(parameters), type(optimizer))


RUN = {"total_samples": 160, "warmup_samples": 40}
TABLE = FactorTable((0, 40, 100), (1.0, 0.2, 0.7))

CONTRACTS = {
    "BatchScaling": Contract(
        attach=_scaling,
        after_step=_set_kappa,
        state=lambda scaling: (scaling.kappa, scaling.lr_factor),
    ),
    "LEGWWarmup": _named(LEGWWarmup, warmup_samples=20, reference_batch=4, then=_halving),
    "PowerScheduler": _named(_power, warmup_samples=16, total_samples=160, decay_samples=40),
    "RefinedSchedule": _named(RefinedSchedule, TABLE, total_samples=150),
    "SampleCosine": _named(SampleCosine, final=0.1, **RUN),
    "SampleLinear": _named(SampleLinear, start=0.5, **RUN),
    "SampleOneCycle": _named(SampleOneCycle, total_samples=160, low=0.3, high=0.5),
    "SampleWSD": _named(SampleWSD, decay_samples=60, shape="sqrt", **RUN),
    "SampleWarmup": _named(SampleWarmup, warmup_samples=100),
    "WeightDecaySchedule": _named(_weight_decay),
    "SampleSchedule": Contract(_schedule, _count, lambda schedule: schedule.state_dict()),
    "base_optimizer": Contract(attach=lambda optimizer, _: base_optimizer(optimizer)),
    "batch_rule": Contract(attach=lambda optimizer, _: batch_rule(optimizer)),
    "param_groups_for": Contract(attach=_grouped),
    "sample_schedules": Contract(_nested, _count, lambda schedule: schedule.state_dict()),
}

every_part = pytest.mark.parametrize("name", CONTRACTS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Run:
    """Two groups; the last parameter of each never has a gradient."""

    def __init__(self, part: str, optimizer: str, saved: dict[str, Any] | None = None) -> None:
        values = [torch.full((3,), 1.0 + i) for i in range(4)] if saved is None else saved["values"]
        self.parameters = [Parameter(value.clone()) for value in values]
        groups = [{"params": self.parameters[:2]}, {"params": self.parameters[2:], "lr": 0.01}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.contract = CONTRACTS[part]
        self.part = self.contract.attach(self.optimizer, None if saved is None else saved["part"])
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])

    def step(self, step: int) -> None:
        for index, parameter in enumerate(self.parameters):
            if index % 2 == 0:
                wave = torch.sin(torch.arange(3.0) + step + index)
                parameter.grad = parameter.detach() * 0.1 + wave
        self.optimizer.step()
        self.contract.after_step(self.part, step)

    def save(self) -> dict[str, Any]:
        file = io.BytesIO()
        values = [parameter.detach() for parameter in self.parameters]
        state = {"values": values, "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"part": self.contract.state(self.part)}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def _values(part: str, optimizer: str, *, interrupted_after: int | None = None) -> torch.Tensor:
    run = Run(part, optimizer)
    for step in range(STEPS):
        run.step(step)
        if step == interrupted_after:
            run = Run(part, optimizer, run.save())
    return torch.cat([parameter.detach() for parameter in run.parameters])


# Works on a DistributedDataParallel and on no optimizer: tested beside DistributedLion. Reads
# weights before there is an optimizer: tested in a file of its own.
ELSEWHERE = {"keep_local_gradients", "welore_ranks"}


def test_every_public_name_has_a_contract() -> None:
    assert sorted(optim.__all__) == sorted([*CONTRACTS, *CASES, *ELSEWHERE])


@every_part
@every_optimizer
def test_save_load_go_on_is_bitwise_the_uninterrupted_run(name: str, optimizer: str) -> None:
    whole = _values(name, optimizer)
    assert whole.isfinite().all()
    for step in (1, 3, 6, 8):
        assert torch.equal(_values(name, optimizer, interrupted_after=step), whole)


@every_part
@every_optimizer
def test_it_is_deterministic(name: str, optimizer: str) -> None:
    assert torch.equal(_values(name, optimizer), _values(name, optimizer))


@every_part
@every_optimizer
def test_gradients_are_left_alone_and_none_is_allowed(name: str, optimizer: str) -> None:
    run = Run(name, optimizer)
    for step in range(STEPS):
        run.step(step)
        for index, parameter in enumerate(run.parameters):
            if index % 2 == 1:
                assert parameter.grad is None
                assert torch.equal(parameter.detach(), torch.full((3,), 1.0 + index))
                assert parameter not in run.optimizer.state
    gradient = run.parameters[0].grad
    assert gradient is not None
    before = gradient.clone()
    run.optimizer.step()
    assert torch.equal(gradient, before)


@every_part
@every_optimizer
def test_the_distance_to_a_target_shrinks(name: str, optimizer: str) -> None:
    run = Run(name, optimizer)
    for step in range(60):
        for parameter in run.parameters:
            parameter.grad = parameter.detach().clone()  # the target is 0
        run.optimizer.step()
        run.contract.after_step(run.part, step)
    begun = [3**0.5 * (1 + index) for index in range(4)]
    ended = [parameter.detach().norm().item() for parameter in run.parameters]
    assert all(b < a for a, b in zip(begun, ended, strict=True))


@every_optimizer
def test_each_group_is_scaled_by_its_own_values(optimizer: str) -> None:
    run = Run("BatchScaling", optimizer)
    run.part.set_kappa(4.0)
    factor = 4.0 if optimizer == "SGD" else 2.0
    assert run.part.lrs() == [0.1 * factor, 0.01 * factor]


def _with_sharded_parameters() -> tuple[torch.Tensor, torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    start, gradients = torch.arange(6.0), [torch.cos(torch.arange(6.0) + s) for s in range(6)]
    plain, sharded = Parameter(start.clone()), Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    for parameter, momentum in ((plain, False), (sharded, True)):
        optimizers = [torch.optim.AdamW([parameter], lr=0.1)]
        optimizers.append(torch.optim.SGD([parameter], lr=0.1, momentum=0.9))
        rules = ("sde", "linear_samples")
        parts = [BatchScaling(o, r) for o, r in zip(optimizers, rules, strict=True)]
        for step, gradient in enumerate(gradients):
            parameter.grad = (
                distribute_tensor(gradient, mesh, [Shard(0)]) if momentum else gradient.clone()
            )
            for part in parts:
                part.optimizer.step()
                part.set_kappa(4.0 if step >= 2 else 1.0)
    assert isinstance(sharded.data, DTensor)
    return sharded.data.full_tensor(), plain.data


def test_parameters_may_be_sharded() -> None:
    for sharded, plain in run_distributed(_with_sharded_parameters):
        assert_accurate(sharded, plain.double())


def test_a_part_survives_deepcopy_of_its_optimizers_state() -> None:
    run = Run("BatchScaling", "Adam")
    run.part.set_kappa(4.0)
    run.step(0)
    state = copy.deepcopy(run.optimizer.state_dict())
    assert [group["lr"] for group in state["param_groups"]] == [0.1, 0.01]
