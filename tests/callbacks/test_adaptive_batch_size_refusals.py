"""What AdaptiveBatchSize refuses, each by one clear error, and what it warns of, once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from harness import Classifier, dataset, fit, loader, trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale


def by_noise(**kwargs: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize("noise_scale", **{"max_global_batch": 64, **kwargs})


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset())


class Pairs(BatchSampler):
    """Somebody else's batch sampler."""


class Normalized(Classifier):
    """Normalizes batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))


def pairs() -> Any:
    return DataLoader(dataset(), batch_sampler=Pairs(SequentialSampler(dataset()), 4, False))


FIT_ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "limit below the start": (
        lambda: by_noise(max_global_batch=7),
        {},
        "max_global_batch=7 is below.*4 × 2 × 1 ranks = 8",
    ),
    "micro limit below the start": (lambda: by_noise(max_micro_batch=3), {}, "max_micro_batch=3"),
    "schedule without a number of samples": (
        lambda: AdaptiveBatchSize("0:8 50%:16"),
        {},
        "percent.*max_samples",
    ),
    "schedule without tokens": (
        lambda: AdaptiveBatchSize("0tok:8 9tok:16"),
        {},
        "tokens_per_sample",
    ),
    "manual optimization": (by_noise, {"module": Manual()}, "manual optimization"),
    "iterable data": (
        by_noise,
        {"train": DataLoader(Endless(), 4)},
        "Endless is an IterableDataset",
    ),
    "no batches": (
        by_noise,
        {"train": DataLoader(dataset(), batch_size=None)},
        "batch sampler .none",
    ),
    "foreign batch sampler": (by_noise, {"train": pairs()}, "Pairs.*AdaptiveBatchSampler"),
    "two loaders": (by_noise, {"train": [loader(), loader()]}, "2 train loaders.*ConcatDataset"),
    "two loaders, combined": (
        by_noise,
        {"train": CombinedLoader({"a": loader(), "b": loader()}, "min_size")},
        "2 train loaders",
    ),
    "not a loader": (by_noise, {"train": [[1, 2, 3]]}, "a list; allowed"),
    "overfit_batches": (by_noise, {"overfit_batches": 2}, "overfit_batches=2.*limit_train_batches"),
    "growth too small": (lambda: by_noise(growth=1.5), {}, "growth=1.5"),
    "unknown rule for the optimizer": (
        lambda: AdaptiveBatchSize("0:8"),
        {"module": Classifier("adagrad")},
        "Adagrad.*Choose one of",
    ),
}


@pytest.mark.parametrize("name", FIT_ERRORS)
def test_settings_that_do_not_fit(name: str) -> None:
    make, settings, message = FIT_ERRORS[name]
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit([make()], **settings)


@pytest.mark.parametrize(
    "other",
    [GradientAccumulationScheduler({0: 1, 1: 2}), LearningRateFinder()],
    ids=lambda other: type(other).__name__,
)
def test_callbacks_that_would_set_the_batch_too(other: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"{type(other).__name__} and Adaptive"):
        fit([AdaptiveBatchSize("0:4"), other], accumulate_grad_batches=1)


def test_a_search_for_the_batch_needs_a_trainer_of_its_own() -> None:
    module = Classifier()
    module.batch_size = 4
    module.train_dataloader = lambda: loader(batch_size=module.batch_size)
    run = trainer([AdaptiveBatchSize("0:8"), BatchSizeFinder()], limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="BatchSizeFinder and Adaptive"):
        run.fit(module)


def test_several_noise_scales_need_a_choice() -> None:
    several = [GradientNoiseScale(1), GradientNoiseScale(every_n_steps=2)]
    with pytest.raises(MisconfigurationException, match="source="):
        fit([by_noise(), *several])
    chosen = by_noise(source=several[1])
    fit([chosen, *several])
    assert chosen.source is several[1]


def test_a_prefix_chooses_the_noise_scale() -> None:
    several = [GradientNoiseScale(1, prefix="a_"), GradientNoiseScale(1, prefix="b_")]
    chosen = by_noise(source="b_")
    fit([chosen, *several])
    assert chosen.source is several[1]


def test_a_prefix_belongs_to_one_noise_scale() -> None:
    with pytest.raises(MisconfigurationException, match=r"'c_' is the prefix of 0.*: 'a_', 'b_'"):
        fit([by_noise(source="c_"), *(GradientNoiseScale(1, prefix=x) for x in ("a_", "b_"))])
    with pytest.raises(MisconfigurationException, match="prefix of 2"):
        fit([by_noise(source=""), GradientNoiseScale(1), GradientNoiseScale(2)])
    with pytest.raises(TypeError, match="source was 1; allowed is a GradientNoiseScale"):
        by_noise(source=1)


def test_a_source_must_take_part() -> None:
    with pytest.raises(MisconfigurationException, match="not among the Trainer's callbacks"):
        fit([by_noise(source=GradientNoiseScale(1))])


def test_two_instances_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type"):
        fit([by_noise(), by_noise()])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rule": "noise"}, "noise_scale"),
        ({"rule": 3}, "rule"),
        ({"rule": "noise_scale"}, "max_global_batch"),
        ({"rule": "0:8 4:"}, "4:"),
        ({"rule": "noise_scale", "max_global_batch": 0}, "max_global_batch"),
        ({"rule": "noise_scale", "max_global_batch": 8, "max_micro_batch": 0}, "max_micro_batch"),
        ({"rule": "noise_scale", "max_global_batch": 8, "max_samples": 0}, "max_samples"),
        ({"rule": "noise_scale", "max_global_batch": 8, "growth": 1.0}, "growth"),
        ({"rule": "noise_scale", "max_global_batch": 8, "threshold": -0.1}, "threshold"),
        ({"rule": "noise_scale", "max_global_batch": 8, "dwell_samples": -1}, "dwell_samples"),
        ({"rule": "noise_scale", "max_global_batch": 8, "lr_rule": "cubic"}, "lr_rule"),
        ({"rule": "0:8", "reference_batch": 0}, "reference_batch"),
        ({"rule": "0:8", "tokens_per_sample": 0}, "tokens_per_sample"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AdaptiveBatchSize(**kwargs)


def test_batch_norm_under_a_changing_micro_batch_warns_once_and_names_the_remedy() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([AdaptiveBatchSize("0:8 16:16 48:32", max_micro_batch=16)], module=Normalized())
        fit([AdaptiveBatchSize("0:8 16:16 48:32")], module=Normalized())
    found = [str(w.message) for w in caught if "normalization" in str(w.message)]
    assert len(found) == 1
    assert "net.1" in found[0]
    assert "GroupNorm" in found[0]


def test_sizes_that_cannot_be_made_are_rounded_down_with_one_warning() -> None:
    adaptive = AdaptiveBatchSize("0:8 16:13 32:29")
    with pytest.warns(
        UserWarning, match="A global batch of 13 cannot be made.*12 is used"
    ) as caught:
        fit([adaptive])
    assert len([w for w in caught if "cannot be made" in str(w.message)]) == 1
    assert adaptive.global_batch == 28


def test_an_interval_of_validation_that_no_longer_fits_warns() -> None:
    with pytest.warns(UserWarning, match="val_check_interval=20 counts batches"):
        fit(
            [AdaptiveBatchSize("0:8 16:32", max_micro_batch=16)],
            val=loader(8, shuffle=False),
            val_check_interval=20,
        )


def test_a_resume_with_other_data_is_refused(tmp_path: Any) -> None:
    _, run = fit([AdaptiveBatchSize("0:8")], max_epochs=1)
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match="96 samples per epoch, this sampler has 50"):
        fit([AdaptiveBatchSize("0:8")], train=loader(50), ckpt_path=tmp_path / "end.ckpt")


def test_a_checkpoint_without_adaptive_batch_size_can_be_continued_with_it(tmp_path: Any) -> None:
    saver = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=5, save_top_k=1)
    fit([saver], max_steps=5, max_epochs=-1, enable_checkpointing=True)
    adaptive = AdaptiveBatchSize("0:8 16:16", max_micro_batch=8)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        module, _ = fit([adaptive], ckpt_path=tmp_path / "plain.ckpt", max_epochs=1)
    assert sum(map(len, module.seen)) == 96 - 5 * 8


def test_a_checkpoint_can_be_continued_without_it(tmp_path: Any) -> None:
    _, run = fit([AdaptiveBatchSize("0:8 16:16")], max_epochs=1)
    run.save_checkpoint(tmp_path / "ours.ckpt")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        module, _ = fit([], ckpt_path=tmp_path / "ours.ckpt", max_epochs=2)
    assert sum(map(len, module.seen)) == 96


def test_after_an_exception_the_trainer_is_as_it_was() -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 9:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    adaptive = AdaptiveBatchSize("0:8 16:32", max_micro_batch=4)
    run = trainer([adaptive], limit_val_batches=0)
    source = run.fit_loop._data_source
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(Breaks(), loader())
    assert run.accumulate_grad_batches == 2
    assert run.fit_loop._data_source is source


def test_a_change_that_has_to_wait_for_the_next_epoch_warns() -> None:
    adaptive = AdaptiveBatchSize("0:20 40:44")
    with pytest.warns(UserWarning, match="from accumulation 5 to 11 it takes .*multiple of 55"):
        fit([adaptive], accumulate_grad_batches=5, max_epochs=2)
    assert adaptive.global_batch == 44


def test_micro_batches_that_are_asked_for_must_be_several() -> None:
    noise = GradientNoiseScale(source="micro_batches")
    with pytest.raises(MisconfigurationException, match=r"at least two parts.*Hint"):
        fit([noise, by_noise()], accumulate_grad_batches=1)
