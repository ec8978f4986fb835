"""Advice on warm-up, learning rate, schedules, momentum, clipping and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import dataset, loader
from harness._recipes import Measured, Scheduler, look, the_advice, topics
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale
from lightning_ext.optim import SampleSchedule

LARGE = {"train": loader(64, 4), "reference_batch": 1}
WARM: dict[str, Scheduler] = {
    "linear": lambda o: torch_schedulers.LinearLR(o, 0.1, 1.0, 4),
    "constant": lambda o: torch_schedulers.ConstantLR(o, 0.1, 4),
    "one cycle": lambda o: torch_schedulers.OneCycleLR(o, 0.1, 8),
    "cyclic": lambda o: torch_schedulers.CyclicLR(o, 0.01, 0.1, 4),
    "lambda": lambda o: torch_schedulers.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "table": lambda o: torch_schedulers.LambdaLR(o, lambda step: [0.1, 0.2, *[1.0] * 7][step]),
    "sequential": lambda o: torch_schedulers.SequentialLR(
        o,
        [torch_schedulers.LinearLR(o, 0.1, 1.0, 4), torch_schedulers.CosineAnnealingLR(o, 4)],
        [4],
    ),
    "chained": lambda o: torch_schedulers.ChainedScheduler(
        [torch_schedulers.ExponentialLR(o, 0.9), torch_schedulers.LinearLR(o, 0.1, 1.0, 4)], o
    ),
    "samples": lambda o: SampleSchedule(o, lambda s: min(1.0, s / 32), samples_per_step=8),
}
COLD: dict[str, Scheduler | None] = {
    "none": None,
    "step": lambda o: torch_schedulers.StepLR(o, 4),
    "cosine": lambda o: torch_schedulers.CosineAnnealingLR(o, 8),
    "later": lambda o: torch_schedulers.SequentialLR(
        o, [torch_schedulers.StepLR(o, 9), torch_schedulers.LinearLR(o, 0.1, 1.0, 4)], [4]
    ),
    "decay": lambda o: torch_schedulers.LinearLR(o, 1.0, 0.1, 8),
    "lambda": lambda o: torch_schedulers.LambdaLR(o, lambda step: 0.9**step),
    "samples": lambda o: SampleSchedule(o, lambda s: 1 - s / 100, samples_per_step=8),
}


@pytest.mark.parametrize("kind", COLD)
def test_a_large_first_batch_wants_a_warm_up(kind: str) -> None:
    advice = the_advice(look(scheduler=COLD[kind], reference_lr=0.0125, **LARGE))
    assert (advice.topic, advice.severity) == ("warm-up", "warning")
    assert advice.recommended.startswith("a linear warm-up over 4 samples, 1 steps")  # 64 · 5/90
    assert "times 8" in advice.recommended  # LEGW


@pytest.mark.parametrize("kind", WARM)
def test_a_warm_up_is_recognized(kind: str) -> None:
    assert "warm-up" not in topics(look(scheduler=WARM[kind], **LARGE))


def test_a_table_is_read_as_far_as_it_goes_where_the_run_has_no_end() -> None:
    ends = AdaptiveBatchSize("0:8", max_samples=64)
    recipe = look(scheduler=WARM["table"], beside=[ends], max_epochs=-1, **LARGE)
    assert "warm-up" not in topics(recipe)


def test_a_scheduler_of_an_unknown_class_is_not_judged() -> None:
    class Own(torch_schedulers.LRScheduler):
        def get_lr(self) -> list[Any]:
            return list(self.base_lrs)

    assert "warm-up" not in topics(look(scheduler=Own, **LARGE))


@pytest.mark.parametrize(("reference", "wanted"), [(2, False), (1, True), (None, False)])
def test_a_warm_up_is_for_a_large_batch(reference: int | None, wanted: bool) -> None:
    recipe = look(train=loader(64, 4), reference_batch=reference)
    assert ("warm-up" in topics(recipe)) is wanted


def test_a_batch_of_1024_counts_as_large_where_no_reference_is_known() -> None:
    many = loader(2048, 512)
    assert "warm-up" in topics(look(train=many))
    assert "warm-up" not in topics(look(train=many, reference_batch=1024, reference_lr=0.1))
    assert "warm-up" in topics(look(train=many, reference_batch=512, reference_lr=0.05))


def test_lambs_warm_up_is_a_share_of_the_run_that_is_linear_in_the_batch() -> None:
    class Lamb(torch.optim.SGD):
        pass

    recipe = look(
        train=loader(2048, 512),
        max_epochs=5,
        optimizer=lambda p: Lamb(p, lr=0.1, momentum=0.9),
    )
    assert "over 64 samples, 1 steps" in the_advice(recipe).recommended  # 10,240 · (1024/512)/320


def test_a_batch_that_grows_in_flight_needs_no_warm_up() -> None:
    growing = AdaptiveBatchSize("0:8 16:64", max_micro_batch=32)
    assert "warm-up" not in topics(look(beside=[growing], train=loader(144, 4)))


def test_a_batch_that_begins_above_its_reference_needs_one() -> None:
    large = AdaptiveBatchSize("0:64", max_micro_batch=32, reference_batch=8)
    assert topics(look(beside=[large], train=loader(128, 4)))["warm-up"] == "warning"


@pytest.mark.parametrize(
    ("optimizer", "lr", "severity"),
    [
        ("sgd", 0.05, None),  # the reference's 0.025 times √4
        ("sgd", 0.1, None),  # times 4
        ("sgd", 0.025, "advice"),
        ("sgd", 0.2, "warning"),
        ("adam", 0.05, None),
        ("adam", 0.036, None),  # times 4^¼
        ("adam", 0.1, "warning"),
        ("adam", 0.025, "advice"),
    ],
)
def test_the_learning_rate_is_compared_with_the_rule(
    optimizer: str, lr: float, severity: str | None
) -> None:
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=lr),
    }
    recipe = look(optimizer=makers[optimizer], reference_batch=2, reference_lr=0.025)
    assert topics(recipe) == ({} if severity is None else {"learning rate": severity})


def test_a_reference_batch_alone_gives_the_factor_of_the_rule() -> None:
    advice = the_advice(look(reference_batch=2))
    assert (advice.topic, advice.severity) == ("learning rate", "note")
    assert advice.recommended.startswith("4 times the reference's learning rate, by the linear")


def test_what_the_callback_scales_needs_no_remark() -> None:
    scaled = AdaptiveBatchSize("0:16", max_micro_batch=8, reference_batch=8)
    assert topics(look(beside=[scaled])) == {}
    against_another = {"reference_batch": 8, "reference_lr": 0.01}
    scaled = AdaptiveBatchSize("0:16", max_micro_batch=8, reference_batch=8)
    assert topics(look(beside=[scaled], **against_another)) == {"learning rate": "warning"}


def test_an_optimizer_without_a_rule_is_not_judged() -> None:
    recipe = look(optimizer=lambda p: torch.optim.Rprop(p), reference_batch=2, reference_lr=1.0)
    assert topics(recipe) == {}


def test_the_learning_rate_should_not_grow_past_the_noise_scale() -> None:
    settings = {"reference_batch": 2, "reference_lr": 0.0125, "train": loader(96, 8)}
    settings["scheduler"] = WARM["linear"]
    assert topics(look(**settings)) == {}  # 8 times
    found = topics(look(beside=[Measured()], **settings))
    assert found == {"learning rate": "warning", "noise scale": "advice"}


@pytest.mark.parametrize(
    ("value", "severity", "found"),
    [
        (9.0, None, ""),
        (2.0, "advice", "a batch of 8, noise scale 2 (1.6 to 2.4): 5 times the least samples"),
        (100.0, "note", "13.5 times the least steps"),
    ],
)
def test_the_batch_is_compared_with_the_noise_scale(
    value: float, severity: str | None, found: str
) -> None:
    noise = Measured()
    noise.value = value
    recipe = look(beside=[noise])
    assert topics(recipe) == ({} if severity is None else {"noise scale": severity})
    assert found in recipe.text


def test_it_looks_again_when_the_noise_scale_is_known() -> None:
    data: Any = dataset(480)
    index, x, _ = data.tensors
    one_class = DataLoader(TensorDataset(index, x, 0 * index), batch_size=4, shuffle=True)
    recipe = look(
        beside=[GradientNoiseScale(1)],
        train=one_class,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
    )
    assert topics(recipe) == {"noise scale": "advice"}


def clip(limit: float, **kwargs: Any) -> dict[str, str]:
    return topics(look(gradient_clip_val=limit, **kwargs))


def test_clipping_is_judged_by_the_fraction_that_it_clips() -> None:
    noise = {"beside": [Measured()]}
    assert clip(1e-6, **noise) == {"gradient clipping": "advice"}
    assert clip(1e6, **noise) == {"gradient clipping": "note"}
    assert clip(1e-6, gradient_clip_algorithm="value", **noise) == {}
    assert clip(1e6) == {}


def test_clipped_steps_are_counted_up_to_the_second_look() -> None:
    growing = AdaptiveBatchSize("0:8 16:32")
    recipe = look(beside=[growing], train=loader(80, 4), gradient_clip_val=1e6)
    assert the_advice(recipe).found == "none of 5 steps is clipped at 1e+06"  # 4 of 8, 1 of 32


def test_a_threshold_of_a_much_smaller_batch_is_a_note() -> None:
    warm = {"scheduler": WARM["linear"], "reference_lr": 0.0125}
    assert clip(1.0, **warm, **LARGE) == {"gradient clipping": "note"}
    assert topics(look(**warm, **LARGE)) == {}


@pytest.mark.parametrize(
    ("optimizer", "severity"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "note"),
        (lambda p: torch.optim.Adam(p, lr=0.1), "advice"),
        (lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.98)), None),
    ],
    ids=["no momentum", "0.999", "0.98"],
)
def test_momentum_at_a_large_batch(optimizer: Any, severity: str | None) -> None:
    wanted = {} if severity is None else {"momentum": severity}
    large = {"scheduler": WARM["linear"], "train": loader(2048, 512)}
    assert topics(look(optimizer=optimizer, **large)) == wanted
    assert topics(look(optimizer=optimizer)) == {}


def test_betas_are_recommended_by_the_sde_rule() -> None:
    warm = {"scheduler": WARM["linear"], "reference_lr": 0.05}
    recipe = look(optimizer=lambda p: torch.optim.Adam(p, lr=0.1), **warm, **LARGE)
    advice = the_advice(recipe)
    assert advice.recommended == "0.992, β₁ likewise to the power 8, eps times 0.354"
