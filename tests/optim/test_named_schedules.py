"""Schedules with a name: torch's curves at a constant batch, the same samples at any other."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from lightning_ext.optim import (
    BatchScaling,
    RefinedSchedule,
    SampleCosine,
    SampleLinear,
    SampleOneCycle,
    SampleSchedule,
    SampleWarmup,
    SampleWSD,
    sample_schedules,
)
from lightning_ext.scaling import FactorTable, refined_factors

TOTAL = 6400
Make = Callable[[Optimizer, int], SampleSchedule]
TABLE = FactorTable((0, 640, 3200), (0.2, 1.0, 0.1))
NAMED: dict[str, Make] = {
    "SampleWarmup": lambda o, b: SampleWarmup(o, warmup_samples=3200, samples_per_step=b),
    "SampleCosine": lambda o, b: SampleCosine(
        o, total_samples=TOTAL, warmup_samples=640, final=0.1, samples_per_step=b
    ),
    "SampleLinear": lambda o, b: SampleLinear(
        o, total_samples=TOTAL, warmup_samples=640, start=0.1, samples_per_step=b
    ),
    "SampleWSD": lambda o, b: SampleWSD(
        o, total_samples=TOTAL, warmup_samples=640, decay_samples=1280, samples_per_step=b
    ),
    "SampleOneCycle": lambda o, b: SampleOneCycle(o, total_samples=TOTAL, samples_per_step=b),
    "RefinedSchedule": lambda o, b: RefinedSchedule(
        o, TABLE, total_samples=TOTAL, samples_per_step=b
    ),
}
every_name = pytest.mark.parametrize("name", NAMED)


def sgd(*lrs: Any) -> Optimizer:
    groups = [{"params": [Parameter(torch.ones(1))], "lr": lr} for lr in lrs or (0.5,)]
    return SGD(groups, momentum=0.9)


def adamw() -> Optimizer:
    return AdamW([Parameter(torch.ones(1))], lr=0.5, betas=(0.9, 0.999))


def hyperparameters(optimizer: Optimizer) -> tuple[float, float]:
    (group,) = optimizer.param_groups
    return group["lr"], group["betas"][0] if "betas" in group else group["momentum"]


def rates(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[tuple[float, float]]:
    """Learning rate and momentum of each step."""
    seen = []
    for _ in range(steps):
        seen.append(hyperparameters(optimizer))
        optimizer.step()
        scheduler.step()
    return seen


def distance(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The largest difference of two lists of rates."""
    pairs = zip(itertools.chain(*found), itertools.chain(*expected), strict=True)
    return max(abs(a - b) for a, b in pairs)


def by_position(name: str, batches: list[int]) -> dict[int, tuple[float, float]]:
    """Learning rate and momentum at each number of samples seen."""
    optimizer = sgd()
    schedule = NAMED[name](optimizer, batches[0])
    found = {}
    for batch in batches:
        found[schedule.samples_seen] = hyperparameters(optimizer)
        optimizer.step()
        schedule.samples_per_step = batch
        schedule.step()
    return found


@every_name
def test_the_rate_at_a_position_is_the_same_at_any_batch_and_through_changes(name: str) -> None:
    fine = by_position(name, [16] * 440)
    coarse = by_position(name, [64] * 110)
    changing = by_position(name, [16] * 100 + [64] * 50 + [48] * 20 + [256] * 4)
    assert len(set(fine.values())) > 60
    for other in (coarse, changing):
        assert len(other) > 100
        assert all(fine[position] == values for position, values in other.items())


@every_name
def test_after_the_end_the_rate_stays(name: str) -> None:
    optimizer = sgd()
    schedule = NAMED[name](optimizer, 640)
    last = [lr for lr, _ in rates(optimizer, schedule, 20)[10:]]
    assert len(set(last)) == 1


@every_name
def test_every_group_keeps_its_own_peak(name: str) -> None:
    optimizer = sgd(1.0, 0.25)
    schedule = NAMED[name](optimizer, 64)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    one, other = schedule.get_last_lr()
    assert one == 4 * other > 0


@every_name
def test_a_learning_rate_in_a_tensor_stays_one(name: str) -> None:
    lr = torch.tensor(0.5)
    tensor, plain = sgd(lr), sgd(0.5)
    for optimizer in (tensor, plain):
        schedule = NAMED[name](optimizer, 64)
        for _ in range(20):
            optimizer.step()
            schedule.step()
    assert tensor.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(plain.param_groups[0]["lr"])


def constant(optimizer: Optimizer) -> LRScheduler:
    return ConstantLR(optimizer, 0.5, total_iters=100)


COMPOSITES: dict[str, Callable[[Optimizer, Callable[[Optimizer], Any]], Any]] = {
    "first": lambda o, make: SequentialLR(o, [make(o), constant(o)], [30]),
    "second": lambda o, make: SequentialLR(o, [constant(o), make(o)], [30]),
    "chained": lambda o, make: ChainedScheduler([make(o)]),
    "chained in sequential": lambda o, make: SequentialLR(
        o, [ChainedScheduler([make(o)]), constant(o)], [30]
    ),
    "sequential in sequential": lambda o, make: SequentialLR(
        o, [SequentialLR(o, [make(o), constant(o)], [30]), constant(o)], [50]
    ),
}
quiet = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")


@quiet
@every_name
@pytest.mark.parametrize("composite", COMPOSITES)
def test_in_a_composite_it_is_what_torchs_own_would_be(composite: str, name: str) -> None:
    ours, theirs = sgd(), sgd()
    factor = NAMED[name](sgd(), 64).fn

    def by_steps(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: factor(64 * step))

    compose = COMPOSITES[composite]
    found = rates(ours, compose(ours, lambda o: NAMED[name](o, 64)), 80)
    expected = rates(theirs, compose(theirs, by_steps), 80)
    assert [lr for lr, _ in found] == [lr for lr, _ in expected]


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@quiet
@every_name
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_it_goes_on_after_a_checkpoint(
    composite: str, make_optimizer: Callable[[], Optimizer], name: str
) -> None:
    optimizer, other = make_optimizer(), make_optimizer()
    scheduler, resumed = (
        COMPOSITES[composite](o, lambda o: NAMED[name](o, 64)) for o in (optimizer, other)
    )
    rates(optimizer, scheduler, 40)
    for schedule in sample_schedules(scheduler):
        schedule.samples_per_step = 16
    resumed.load_state_dict(reloaded(scheduler.state_dict()))
    other.load_state_dict(reloaded(optimizer.state_dict()))
    assert rates(other, resumed, 40) == rates(optimizer, scheduler, 40)


def test_a_state_holds_counts_and_no_settings() -> None:
    optimizer, other = sgd(), sgd()
    saved = SampleOneCycle(optimizer, total_samples=100, samples_per_step=10)
    rates(optimizer, saved, 3)
    longer = SampleOneCycle(other, total_samples=1000, samples_per_step=10)
    longer.load_state_dict(reloaded(saved.state_dict()))
    assert longer.samples_seen == 30
    assert longer.get_lr() == [0.5 * longer.fn(30)]
    assert longer.fn(300) == 1


def test_the_cosine_is_torchs() -> None:
    ours, theirs = sgd(), sgd()
    found = rates(ours, SampleCosine(ours, total_samples=6400, final=0.2, samples_per_step=64), 100)
    expected = rates(theirs, CosineAnnealingLR(theirs, T_max=100, eta_min=0.1), 100)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("final", [0.0, 0.3])
def test_the_line_is_torchs(final: float) -> None:
    ours, theirs = sgd(), sgd()
    schedule = SampleLinear(ours, total_samples=6400, final=final, samples_per_step=64)
    expected = LinearLR(theirs, start_factor=1.0, end_factor=final, total_iters=100)
    assert distance(rates(ours, schedule, 120), rates(theirs, expected, 120)) < 1e-12


def test_the_warm_up_is_torchs() -> None:
    ours, theirs = sgd(), sgd()
    schedule = SampleWarmup(ours, warmup_samples=3200, start=0.25, samples_per_step=64)
    expected = LinearLR(theirs, start_factor=0.25, total_iters=50)
    assert distance(rates(ours, schedule, 80), rates(theirs, expected, 80)) < 1e-12


def test_a_warm_up_and_a_cosine_are_torchs_two_in_sequence() -> None:
    ours, theirs = sgd(), sgd()
    schedule = SampleCosine(
        ours, total_samples=6400, warmup_samples=1280, start=0.1, samples_per_step=64
    )
    parts = [LinearLR(theirs, 0.1, total_iters=20), CosineAnnealingLR(theirs, T_max=80)]
    found = rates(ours, schedule, 100)
    assert distance(found, rates(theirs, SequentialLR(theirs, parts, [20]), 100)) < 1e-12


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_one_cycle_is_torchs_with_its_momentum(make_optimizer: Callable[[], Optimizer]) -> None:
    ours, theirs = make_optimizer(), make_optimizer()
    steps, share = 101, 0.3  # torch counts its last step as the end
    expected = OneCycleLR(theirs, max_lr=0.5, total_steps=steps, pct_start=share)
    schedule = SampleOneCycle(
        ours,
        total_samples=64 * (steps - 1),
        peak_at=(share * steps - 1) / (steps - 1),
        final=1e-4 / 25,
        samples_per_step=64,
    )
    found = rates(ours, schedule, steps)
    assert distance(found, rates(theirs, expected, steps)) < 1e-12
    assert min(momentum for _, momentum in found) == pytest.approx(0.85, abs=1e-3)


def test_one_cycle_leaves_the_other_betas_alone() -> None:
    optimizer = adamw()
    SampleOneCycle(optimizer, total_samples=100, samples_per_step=10)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.999)


def test_one_cycle_can_leave_the_momentum_alone() -> None:
    optimizer = sgd()
    schedule = SampleOneCycle(
        optimizer, total_samples=100, cycle_momentum=False, samples_per_step=10
    )
    assert {momentum for _, momentum in rates(optimizer, schedule, 10)} == {0.9}


def test_one_cycle_without_a_momentum_to_cycle_is_refused() -> None:
    optimizer = Adagrad([Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="Adagrad has a group without momentum"):
        SampleOneCycle(optimizer, total_samples=100, samples_per_step=10)


def test_under_batch_scaling_the_groups_show_the_cycle_alone() -> None:
    plain, scaled = adamw(), adamw()
    found = []
    for optimizer in (plain, scaled):
        schedule = SampleOneCycle(optimizer, total_samples=640, samples_per_step=64)
        if optimizer is scaled:
            BatchScaling(optimizer, kappa=4.0)
        found.append(rates(optimizer, schedule, 10))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: SampleWarmup(o, warmup_samples=-1, samples_per_step=8), "warmup_samples=-1"),
        (lambda o: SampleWarmup(o, warmup_samples=9, samples_per_step=0), "samples_per_step was 0"),
        (
            lambda o: SampleCosine(o, total_samples=99, warmup_samples=100, samples_per_step=8),
            "warmup_samples=100 do not fit in total_samples=99",
        ),
        (lambda o: SampleLinear(o, total_samples=0, samples_per_step=8), "total_samples=0"),
        (lambda o: SampleLinear(o, total_samples=9, final=2.0, samples_per_step=8), "final=2.0"),
        (
            lambda o: SampleWSD(
                o, total_samples=9, warmup_samples=5, decay_samples=5, samples_per_step=8
            ),
            "warmup_samples=5 and decay_samples=5 do not fit",
        ),
        (
            lambda o: SampleOneCycle(o, total_samples=9, low=0.9, high=0.8, samples_per_step=8),
            "low=0.9 is above high=0.8",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[Optimizer], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(sgd())


def test_equal_norms_give_exactly_the_straight_line() -> None:
    table = FactorTable(tuple(range(0, 101 * 64, 64)), tuple(refined_factors([3.0] * 101)))
    ours, line = sgd(1.0), sgd(1.0)
    refined = RefinedSchedule(ours, table, samples_per_step=64)
    straight = SampleLinear(line, total_samples=6400, samples_per_step=64)
    assert distance(rates(ours, refined, 110), rates(line, straight, 110)) < 1e-15


def test_a_table_is_stretched_to_another_length() -> None:
    factors = []
    for total in (3200, 9600):
        optimizer = sgd(1.0)
        schedule = RefinedSchedule(
            optimizer, TABLE, total_samples=total, samples_per_step=total // 40
        )
        factors.append(rates(optimizer, schedule, 50))
    assert distance(*factors) < 1e-12
    assert factors[0][8] == (1.0, 0.9)


def test_a_table_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(TABLE.to_json(), encoding="utf-8")
    ours, theirs = sgd(), sgd()
    read = RefinedSchedule.from_file(ours, tmp_path / "table.json", samples_per_step=64)
    given = RefinedSchedule(theirs, TABLE, samples_per_step=64)
    assert rates(ours, read, 60) == rates(theirs, given, 60)


def test_a_file_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="no table of factors"):
        RefinedSchedule.from_file(sgd(), tmp_path / "other.json", samples_per_step=64)


def test_named_schedules_are_found_in_composites() -> None:
    optimizer = sgd()
    makes = list(itertools.islice(NAMED.values(), 2))
    composite = SequentialLR(optimizer, [make(optimizer, 64) for make in makes], [10])
    assert [type(s).__name__ for s in sample_schedules(composite)] == list(NAMED)[:2]


def loss_after(make: Make, lr: float, seed: int, *, steps: int = 400) -> float:
    """Of a noisy logistic regression, by SGD on batches of 8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 20, generator=generator, dtype=torch.float64)
    noise = 2 * torch.randn(1000, generator=generator, dtype=torch.float64)
    y = (x @ torch.linspace(-1, 1, 20, dtype=torch.float64) + noise > 0).double()
    weight = Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = SGD([weight], lr=lr)
    schedule = make(optimizer, 8)
    generator.manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(1000, (8,), generator=generator)
        weight.grad = x[index].T @ (torch.sigmoid(x[index] @ weight.detach()) - y[index]) / 8
        optimizer.step()
        schedule.step()
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y).item()


def test_a_line_ends_no_higher_than_a_cosine_and_lower_than_a_constant_rate() -> None:
    # Defazio et al. 2023, for a rate that is tuned for each.
    makes: dict[str, Make] = {
        "constant": lambda o, b: SampleSchedule(o, lambda seen: 1.0, samples_per_step=b),
        "cosine": lambda o, b: SampleCosine(o, total_samples=3200, samples_per_step=b),
        "line": lambda o, b: SampleLinear(o, total_samples=3200, samples_per_step=b),
    }
    best = {
        name: min(
            sum(loss_after(make, lr, seed) for seed in (1, 2, 3)) for lr in (0.125, 0.25, 0.5)
        )
        for name, make in makes.items()
    }
    assert best["line"] <= best["cosine"] < best["constant"]
