"""Arguments of the wrong type or out of range: one error with name, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_ext import scaling
from lightning_ext.callbacks import EMA, AdaptiveBatchSize, GradientNoiseScale

COUNTS = ["64", 64.5, 0, -1, True, float("nan")]
NUMBERS = ["2", None, True, float("nan")]


def adaptive(**kwargs: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize(**{"rule": "noise_scale", "max_global_batch": 64, **kwargs})


CASES: list[tuple[Any, str, list[Any]]] = [
    (adaptive, "max_global_batch", COUNTS),
    (adaptive, "max_micro_batch", COUNTS),
    (adaptive, "max_samples", COUNTS),
    (adaptive, "tokens_per_sample", COUNTS),
    (adaptive, "reference_batch", COUNTS),
    (adaptive, "dwell_samples", ["many", -1, 1.5]),
    (adaptive, "growth", [*NUMBERS, 1.0]),
    (adaptive, "threshold", [*NUMBERS, -0.1]),
    (adaptive, "monotone", ["no", 1]),
    (adaptive, "rescale_last_window", ["no"]),
    (adaptive, "scale_weight_decay", [None]),
    (adaptive, "lr_rule", ["cubic", None]),
    (adaptive, "source", [3, GradientNoiseScale]),
    (EMA, "decay", [*NUMBERS, 0, 1, -0.5]),
    (EMA, "every_n_steps", [*COUNTS, None]),
    (EMA, "reference_batch", COUNTS),
    (EMA, "warmup", [100, "yes"]),
    (EMA, "export", ["average.ckpt"]),
    (GradientNoiseScale, "every_n_steps", COUNTS),
    (GradientNoiseScale, "smoothing", [*NUMBERS, 0, 1.1]),
    (GradientNoiseScale, "source", ["ranks"]),
    (GradientNoiseScale, "geometry", ["l2"]),
    (GradientNoiseScale, "per_module", [1, [2]]),
    (GradientNoiseScale, "per_group", [2]),
    (GradientNoiseScale, "prefix", [None]),
]


@pytest.mark.parametrize(
    ("make", "name", "value"), [(make, name, v) for make, name, values in CASES for v in values]
)
def test_a_wrong_argument_is_named(make: Any, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{name} was .*; allowed (is|are) "):
        make(**{name: value})


def test_averages_of_two_kinds_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="WeightAveraging would both"):
        fit([EMA(), EMAWeightAveraging()])


def test_a_checkpoint_with_other_averages_warns(tmp_path: Path) -> None:
    _, run = fit([EMA(0.9)], max_epochs=1)
    run.save_checkpoint(tmp_path / "end.ckpt")
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.warns(UserWarning, match=r"averages of .*'decay': 0.9.*, none of .*0.99"),
    ):
        fit([EMA(0.99)], ckpt_path=tmp_path / "end.ckpt")


def test_the_warm_up_counts_samples_not_steps() -> None:
    average = EMA(0.9, warmup=True)
    schedule = AdaptiveBatchSize("0:8 24:16 56:32", max_micro_batch=16, reference_batch=8)
    weights: list[torch.Tensor] = []

    class Note(EMA):
        def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
            if not run.fit_loop._should_accumulate():
                weights.append(module.net[0].weight.detach().double().clone())

    module = Classifier("sgd")
    expected = module.net[0].weight.detach().double().clone()
    fit([schedule, average, Note(0.5)], module=module, train=loader(88), max_epochs=1)
    seen = 0
    for batch, weight in zip([8, 8, 8, 16, 16, 32], weights, strict=True):
        seen += batch
        decay = scaling.ema_warmup(0.9, seen / 8) ** (batch / 8)
        expected = decay * expected + (1 - decay) * weight
    assert average._average is not None
    found = average._average._tensors["net.0.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
