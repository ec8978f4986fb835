"""Schedules that read the live batch: the power law and LEGW's warm-up."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from lightning_ext.optim import LEGWWarmup, PowerScheduler, SampleWSD
from lightning_ext.scaling import legw_warmup, linear_factor, power_lr, warmup_factor

TOKENS = 4096


def adamw(*lrs: Any) -> Optimizer:
    return AdamW([{"params": [Parameter(torch.ones(1))], "lr": lr} for lr in lrs or (1.0,)])


def power(optimizer: Optimizer, samples_per_step: int = 16, **kwargs: Any) -> PowerScheduler:
    return PowerScheduler(
        optimizer, tokens_per_sample=TOKENS, samples_per_step=samples_per_step, **kwargs
    )


def lr_of(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def advance(optimizer: Optimizer, schedule: Any, steps: int) -> list[float]:
    """The learning rate of each step."""
    seen = []
    for _ in range(steps):
        seen.append(lr_of(optimizer))
        optimizer.step()
        schedule.step()
    return seen


def test_the_rate_is_the_laws_at_the_tokens_seen() -> None:
    optimizer = adamw()
    found = advance(optimizer, power(optimizer), 1000)
    assert found == [power_lr(step * 16 * TOKENS, global_batch=16) for step in range(1000)]
    assert found[0] == 0.02 > 3 * found[999]


def test_the_rate_of_the_coming_step_follows_the_live_batch() -> None:
    optimizer = adamw()
    schedule = power(optimizer, 16)
    advance(optimizer, schedule, 1000)
    before = lr_of(optimizer)
    schedule.samples_per_step = 32
    assert lr_of(optimizer) == pytest.approx(2 * before)
    assert schedule.get_last_lr() == [lr_of(optimizer)]
    assert schedule.samples_seen == 16_000
    advance(optimizer, schedule, 1)
    assert lr_of(optimizer) == power_lr(16_032 * TOKENS, global_batch=32)


def test_the_batch_that_is_set_again_changes_nothing() -> None:
    optimizer = adamw()
    schedule = power(optimizer, 16)
    advance(optimizer, schedule, 100)
    optimizer.param_groups[0]["lr"] = 0.123  # another's doing
    schedule.samples_per_step = 16
    assert lr_of(optimizer) == 0.123


def test_groups_multiply_the_law_as_mup_wants() -> None:
    optimizer = adamw(1.0, 0.25)
    schedule = power(optimizer, 16)
    advance(optimizer, schedule, 300)
    schedule.samples_per_step = 32
    inner = [group["lr"] for group in optimizer.param_groups]
    assert inner == [power_lr(4800 * TOKENS, global_batch=32) * k for k in (1, 0.25)]


def test_a_rate_in_a_tensor_follows_in_place() -> None:
    lr = torch.tensor(1.0)
    optimizer = SGD([Parameter(torch.ones(1))], lr=lr)
    schedule = power(optimizer, 16)
    advance(optimizer, schedule, 1000)
    schedule.samples_per_step = 64
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(power_lr(16_000 * TOKENS, global_batch=64))
    assert schedule.get_last_lr()[0] is not lr


def test_an_idle_one_in_a_composite_leaves_the_rate_alone() -> None:
    optimizer = adamw()
    first, second = power(optimizer, 16), power(optimizer, 16, lr_max=0.01)
    composite = SequentialLR(optimizer, [first, ConstantLR(optimizer, 0.5), second], [5, 8])
    advance(optimizer, composite, 6)
    for schedule in (first, second):
        schedule.samples_per_step = 64
    assert lr_of(optimizer) == 0.5


def test_a_warm_up_and_a_decay_join_the_law_without_a_jump() -> None:
    optimizer = adamw()
    kwargs = {"warmup_samples": 1600, "total_samples": 16_000, "decay_samples": 3200}
    found = advance(optimizer, power(optimizer, 16, **kwargs), 1001)
    law = [power_lr(16 * step * TOKENS, global_batch=16) for step in range(1001)]
    assert found[50] == pytest.approx(law[100] / 2)
    assert found[100:800] == law[100:800]
    assert found[900] == pytest.approx(law[800] / 2)
    assert found[0] == found[1000] == 0


def test_a_checkpoint_keeps_the_counts_and_no_settings() -> None:
    optimizer, other = adamw(), adamw()
    schedule, resumed = power(optimizer, 16), power(other, 16, a=2.0)
    advance(optimizer, schedule, 1000)
    schedule.samples_per_step = 32
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    other.load_state_dict(optimizer.state_dict())
    assert resumed.samples_per_step == 32
    assert advance(other, resumed, 1) == advance(optimizer, schedule, 1)
    assert lr_of(other) == pytest.approx(lr_of(optimizer) / 2)


def test_an_optimizer_with_a_rate_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr=\[0.001\].*Hint: build the optimizer with lr=1.0"):
        power(adamw(1e-3))


def test_tokens_per_sample_are_checked() -> None:
    with pytest.raises(ValueError, match="tokens_per_sample was 0"):
        PowerScheduler(adamw(), tokens_per_sample=0, samples_per_step=8)


def legw(optimizer: Optimizer, samples_per_step: int, **kwargs: Any) -> LEGWWarmup:
    return LEGWWarmup(
        optimizer,
        warmup_samples=1600,
        reference_batch=16,
        samples_per_step=samples_per_step,
        **kwargs,
    )


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_at_a_constant_batch_the_warm_up_is_kappa_times_as_long(batch: int) -> None:
    optimizer = adamw()
    length = legw_warmup(1600, batch / 16)
    ramp = [warmup_factor(batch * step, warmup_samples=length) for step in range(150)]
    assert advance(optimizer, legw(optimizer, batch), 150) == pytest.approx(ramp, abs=1e-15)


def test_the_published_warm_up_of_32k_images_is_reached() -> None:
    # You et al. 2019: ImageNet, 0.3125 epochs at batch 1024, 10 epochs at 32768.
    epoch, optimizer = 1_281_167, adamw()
    schedule = LEGWWarmup(
        optimizer,
        warmup_samples=round(0.3125 * epoch),
        reference_batch=1024,
        samples_per_step=32_768,
    )
    while lr_of(optimizer) < 1:
        advance(optimizer, schedule, 1)
    assert schedule.samples_seen / epoch == pytest.approx(10, abs=0.03)


def test_a_batch_that_changes_changes_the_speed_and_makes_no_jump() -> None:
    optimizer = adamw()
    schedule = legw(optimizer, 16)
    advance(optimizer, schedule, 40)
    schedule.samples_per_step = 64
    rates = advance(optimizer, schedule, 70)
    assert rates[0] == pytest.approx(0.4)
    assert rates[1] - rates[0] == pytest.approx(0.01)
    assert rates[60] == 1.0
    assert schedule.samples_seen == 40 * 16 + 70 * 64


def test_its_function_tells_what_will_hold_at_the_present_batch() -> None:
    optimizer = adamw()
    schedule = legw(optimizer, 64)
    advance(optimizer, schedule, 20)
    schedule.samples_per_step = 16
    assert [schedule.fn(n) for n in (0, 64 * 20, 64 * 20 + 16 * 30)] == [0.0, 0.2, 0.5]
    advance(optimizer, schedule, 30)
    assert lr_of(optimizer) == 0.5


def test_a_decay_by_samples_goes_on_top() -> None:
    optimizer = adamw()
    decay = partial(linear_factor, total_samples=16_000)
    rates = advance(optimizer, legw(optimizer, 64, then=decay), 250)
    assert rates[50] == pytest.approx(0.5 * decay(50 * 64))
    assert rates[200] == decay(200 * 64)


def test_a_warm_up_that_is_over_leaves_its_successor_alone() -> None:
    optimizer = adamw()
    stable = SampleWSD(
        optimizer, total_samples=64_000, warmup_samples=0, decay_samples=100, samples_per_step=16
    )
    first = legw(optimizer, 16)
    composite = SequentialLR(optimizer, [first, stable], [100])
    advance(optimizer, composite, 120)
    for schedule in (first, stable):
        schedule.samples_per_step = 128
    assert lr_of(optimizer) == 1.0


def test_legws_state_holds_counts_alone() -> None:
    optimizer = adamw()
    state = legw(optimizer, 16, then=lambda samples: 1.0).state_dict()
    assert {key for key in state if key.startswith("_")} <= {
        "_counted_steps",
        "_get_lr_called_within_step",
        "_is_initial",
        "_last_lr",
        "_step_count",
    }


def test_a_reference_batch_is_positive() -> None:
    with pytest.raises(ValueError, match="reference_batch was 0"):
        LEGWWarmup(adamw(), warmup_samples=10, reference_batch=0, samples_per_step=8)
