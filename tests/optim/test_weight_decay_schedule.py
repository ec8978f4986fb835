"""Weight decay in phases by samples."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler

from lightning_ext.optim import BatchScaling, SampleCosine, WeightDecaySchedule

PHASES = {0: 0.0, 320: 0.5, 640: 0.1}  # the three values of SlimPajama-DC


def adamw(*decays: float) -> Optimizer:
    groups = [{"params": [Parameter(torch.ones(1))], "weight_decay": d} for d in decays or (0.1,)]
    return AdamW(groups, lr=0.5)


def decays(optimizer: Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The weight decay of each step."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.step()
        scheduler.step()
    return seen


def test_each_phase_has_its_value() -> None:
    optimizer = adamw()
    found = decays(optimizer, WeightDecaySchedule(optimizer, PHASES, samples_per_step=32), 30)
    assert found == [0.0] * 10 + [0.5] * 10 + [0.1] * 10


def test_the_value_at_a_position_is_the_same_through_changes_of_the_batch() -> None:
    optimizer = adamw()
    schedule = WeightDecaySchedule(optimizer, PHASES, samples_per_step=16)
    found = decays(optimizer, schedule, 20)
    schedule.samples_per_step = 160
    found += decays(optimizer, schedule, 3)
    assert found == [0.0] * 20 + [0.5, 0.5, 0.1]


def test_groups_without_weight_decay_are_left_alone() -> None:
    optimizer = adamw(0.1, 0.0)
    decays(optimizer, WeightDecaySchedule(optimizer, PHASES, samples_per_step=32), 15)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_the_learning_rate_is_another_schedules() -> None:
    alone, beside = adamw(), adamw()
    found = []
    for optimizer in (alone, beside):
        cosine = SampleCosine(optimizer, total_samples=640, samples_per_step=32)
        decay = WeightDecaySchedule(adamw(), PHASES, samples_per_step=32)
        if optimizer is beside:
            decay = WeightDecaySchedule(optimizer, PHASES, samples_per_step=32)
        rates = []
        for _ in range(20):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            decay.optimizer.step()
            cosine.step()
            decay.step()
        found.append(rates)
    assert found[0] == found[1]
    assert found[0][10] == 0.25


def test_a_learning_rate_in_a_tensor_stays_as_it_is() -> None:
    lr = torch.tensor(0.5)
    optimizer = SGD([Parameter(torch.ones(1))], lr=lr, weight_decay=0.1)
    decays(optimizer, WeightDecaySchedule(optimizer, PHASES, samples_per_step=32), 15)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5


def test_it_goes_on_after_a_checkpoint_in_a_phase_without_decay() -> None:
    optimizer, other = adamw(), adamw()
    pair = []
    for each in (optimizer, other):
        cosine = SampleCosine(each, total_samples=1280, samples_per_step=32)
        decay = WeightDecaySchedule(each, PHASES, samples_per_step=32)
        pair.append(ChainedScheduler([cosine, decay]))
    decays(optimizer, pair[0], 7)
    file = io.BytesIO()
    torch.save([pair[0].state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    scheduler, state = torch.load(file, weights_only=True)
    pair[1].load_state_dict(scheduler)
    other.load_state_dict(state)
    assert decays(other, pair[1], 25) == decays(optimizer, pair[0], 25)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_batch_scaling_goes_on_top() -> None:
    optimizer = adamw()
    schedule = WeightDecaySchedule(optimizer, {0: 0.5}, samples_per_step=32)
    BatchScaling(optimizer, "sqrt", kappa=4.0)
    used = []
    optimizer.step(lambda: used.append(optimizer.param_groups[0]["weight_decay"]))
    schedule.step()
    assert used == [1.0]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({}, "the first phase begins at 0"),
        ({10: 0.1}, "the first phase begins at 0"),
        ({0: 0.1, 50: 0.2, 40: 0.3}, "goes back from 50 to 40"),
        ({0: 0.1, 50: -0.2}, "weight decay -0.2"),
        ({0: float("nan")}, "weight decay nan"),
    ],
)
def test_phases_out_of_order_or_range_are_refused(phases: dict[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightDecaySchedule(adamw(), phases, samples_per_step=32)


def test_an_optimizer_without_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="No group of the optimizer has weight decay"):
        WeightDecaySchedule(adamw(0.0), PHASES, samples_per_step=32)
