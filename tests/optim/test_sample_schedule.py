"""Learning rates by samples seen."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    SequentialLR,
)

from lightning_ext.optim import BatchScaling, SampleSchedule, sample_schedules


def sgd(*lrs: float) -> Optimizer:
    return SGD([{"params": [Parameter(torch.ones(1))], "lr": lr} for lr in lrs or (1.0,)])


def line(samples: int) -> float:
    return 1 - samples / 100


def schedule_of(optimizer: Optimizer, samples_per_step: int = 10) -> SampleSchedule:
    return SampleSchedule(optimizer, line, samples_per_step=samples_per_step)


def lrs(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rate of each step."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_first_step_is_at_no_samples_seen() -> None:
    optimizer = sgd()
    schedule = schedule_of(optimizer)
    assert schedule.samples_seen == 0
    assert lrs(optimizer, schedule, 4) == [1.0, 0.9, 0.8, 0.7]


def test_samples_per_step_changes_in_flight() -> None:
    optimizer = sgd()
    schedule = schedule_of(optimizer)
    seen = lrs(optimizer, schedule, 2)
    schedule.samples_per_step = 30
    seen += lrs(optimizer, schedule, 2)
    assert schedule.samples_seen == 80
    assert seen + schedule.get_last_lr() == pytest.approx([1.0, 0.9, 0.8, 0.5, 0.2])


def test_what_sets_the_samples_of_a_step_may_come_later() -> None:
    optimizer = sgd()
    schedule = SampleSchedule(optimizer, line)
    schedule.samples_per_step = 10
    assert lrs(optimizer, schedule, 3) == [1.0, 0.9, 0.8]


def test_without_the_samples_of_a_step_the_first_one_says_so() -> None:
    optimizer = sgd()
    schedule = SampleSchedule(optimizer, line)
    optimizer.step()
    with pytest.raises(ValueError, match=r"SampleSchedule does not know.*Hint: AdaptiveBatchSize"):
        schedule.step()


def test_the_same_samples_give_the_same_lr_whatever_the_steps_were() -> None:
    ends = []
    for sizes in ([8] * 12, [48, 48], [1, 95], [96]):
        optimizer = sgd()
        schedule = schedule_of(optimizer, 7)
        for size in sizes:
            schedule.samples_per_step = size
            lrs(optimizer, schedule, 1)
        ends.append(schedule.get_last_lr())
    assert ends == [[line(96)]] * 4


def test_each_group_keeps_its_own_base() -> None:
    optimizer = sgd(1.0, 0.1)
    schedule = schedule_of(optimizer)
    lrs(optimizer, schedule, 5)
    assert schedule.get_last_lr() == [0.5, 0.05]


def test_asking_for_the_lr_counts_nothing() -> None:
    optimizer = sgd()
    schedule = schedule_of(optimizer)
    lrs(optimizer, schedule, 2)
    assert schedule.get_lr() == schedule.get_lr() == schedule.get_last_lr() == [0.8]


def test_a_learning_rate_in_a_tensor_stays_one() -> None:
    lr = torch.tensor(1.0)
    optimizer = SGD([Parameter(torch.ones(1))], lr=lr)
    lrs(optimizer, schedule_of(optimizer), 3)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.7)


def test_it_goes_on_after_a_checkpoint() -> None:
    optimizer, other = sgd(), sgd()
    schedule = schedule_of(optimizer)
    lrs(optimizer, schedule, 2)
    schedule.samples_per_step = 5
    file = io.BytesIO()
    torch.save({"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = schedule_of(other)
    resumed.load_state_dict(saved["schedule"])
    other.load_state_dict(saved["optimizer"])
    assert resumed.samples_per_step == 5
    assert lrs(other, resumed, 4) == lrs(optimizer, schedule, 4)


@pytest.mark.parametrize("wrong", [0, -1])
def test_samples_per_step_that_is_not_positive_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"samples_per_step was {wrong}; it must be positive"):
        schedule_of(sgd(), wrong)


def by_steps(optimizer: Optimizer) -> LRScheduler:
    """The same line by steps of 10 samples, by torch alone."""
    return LambdaLR(optimizer, lambda step: line(10 * step))


def constant(optimizer: Optimizer) -> LRScheduler:
    return ConstantLR(optimizer, 0.5, total_iters=100)


COMPOSITES = {
    "first": lambda o, make: SequentialLR(o, [make(o), constant(o)], [3]),
    "second": lambda o, make: SequentialLR(o, [constant(o), make(o)], [3]),
    "both": lambda o, make: SequentialLR(o, [make(o), make(o)], [3]),
    "chained": lambda o, make: ChainedScheduler([make(o)]),
    "chained in sequential": lambda o, make: SequentialLR(
        o, [ChainedScheduler([make(o)]), constant(o)], [3]
    ),
    "sequential in sequential": lambda o, make: SequentialLR(
        o, [SequentialLR(o, [make(o), constant(o)], [3]), constant(o)], [5]
    ),
}


def composites(test: Callable[[str], None]) -> Callable[[str], None]:
    # torch's own composites step twice before the optimizer does when they are nested
    quiet = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
    return pytest.mark.parametrize("name", COMPOSITES)(quiet(test))


@composites
def test_inside_a_composite_it_is_what_torchs_own_would_be(name: str) -> None:
    ours, theirs = sgd(), sgd()
    composite = COMPOSITES[name](ours, schedule_of)
    expected = COMPOSITES[name](theirs, by_steps)
    assert lrs(ours, composite, 8) == lrs(theirs, expected, 8)


@composites
def test_a_composite_goes_on_after_a_checkpoint(name: str) -> None:
    optimizer, other = sgd(), sgd()
    composite, resumed = (COMPOSITES[name](o, schedule_of) for o in (optimizer, other))
    lrs(optimizer, composite, 4)
    resumed.load_state_dict(composite.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert lrs(other, resumed, 4) == lrs(optimizer, composite, 4)


@composites
def test_the_schedules_in_a_composite_are_found(name: str) -> None:
    found = list(sample_schedules(COMPOSITES[name](sgd(), schedule_of)))
    assert len(found) == (2 if name == "both" else 1)
    assert all(isinstance(schedule, SampleSchedule) for schedule in found)


def test_other_schedulers_hold_none() -> None:
    assert list(sample_schedules(ExponentialLR(sgd(), 0.9))) == []
    assert list(sample_schedules(object())) == []


def test_with_batch_scaling_the_groups_show_the_schedule_alone() -> None:
    optimizer = sgd()
    schedule, scaling = schedule_of(optimizer), BatchScaling(optimizer)
    lrs(optimizer, schedule, 2)
    scaling.set_kappa(4.0)
    schedule.samples_per_step = 40
    assert (optimizer.param_groups[0]["lr"], scaling.lrs()) == (0.8, [3.2])
    lrs(optimizer, schedule, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(line(60))
