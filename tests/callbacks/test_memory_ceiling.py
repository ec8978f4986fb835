"""AdaptiveBatchSize where the micro-batch that it would take does not fit."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader

from lightning_ext.callbacks import AdaptiveBatchSize, GradientNoiseScale, MicroBatchFinder


class Small(Classifier):
    """Runs out of memory above eight samples."""

    def __init__(self) -> None:
        super().__init__("sgd", dropout=0.0)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory, as it were")
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def adaptive(**kwargs: Any) -> AdaptiveBatchSize:
    return AdaptiveBatchSize("0:8 16:64", **{"max_micro_batch": 32} | kwargs)


def weights(module: Any) -> Any:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double()


def test_training_goes_on_with_a_smaller_micro_batch_and_the_same_global_batch() -> None:
    batch = adaptive()
    with pytest.warns(UserWarning, match="32 samples ran out of memory"):
        module, run = fit([batch], module=Small(), train=loader(400), max_epochs=1)
    whole = Classifier("sgd", dropout=0.0)
    fit([adaptive()], module=whole, train=loader(400), max_epochs=1)
    assert run.global_step == 2 + 6
    assert batch.global_batch == 64
    assert tuple(batch.batch.in_force) == (8, 8)
    assert sorted(chain(*module.seen)) == list(range(400))
    assert (weights(module) - weights(whole)).norm() < 1e-6 * weights(whole).norm()


def test_it_ends_the_fit_where_that_is_asked_for() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit([adaptive(on_oom="raise")], module=Small(), train=loader(400), max_epochs=1)


@pytest.mark.parametrize("limit", [None, 32])
def test_a_finder_knows_before_it_happens(limit: int | None) -> None:
    batch = adaptive(max_micro_batch=limit)
    finder = MicroBatchFinder(max_micro_batch=64, subprocess=False)
    _, run = fit([batch, finder], module=Small(), train=loader(400), max_epochs=1)
    assert finder.micro_batch == 8
    assert tuple(batch.batch.in_force) == (8, 8)
    assert run.global_step == 4 + 6  # from 2 passes to 8 at a batch that is a multiple of 8


def test_a_start_that_does_not_fit_begins_with_smaller_micro_batches() -> None:
    batch = AdaptiveBatchSize("0:32", reference_batch=32)
    finder = MicroBatchFinder(subprocess=False)
    module, run = fit([batch, finder], module=Small(), train=loader(96, 16), max_epochs=1)
    assert tuple(batch.batch.in_force) == (8, 4)
    assert run.global_step == 3
    assert sorted(chain(*module.seen[-12:])) == list(range(96))


def test_a_step_that_ran_in_parts_is_not_measured() -> None:
    noise = GradientNoiseScale(1)
    with pytest.warns(UserWarning, match="ran out of memory"):
        fit([adaptive(), noise], module=Small(), train=loader(400), max_epochs=1)
    # Not the first of the large steps, which ran in parts, and not the last, which is cut.
    assert noise.estimate().samples == 2 * 8 + 4 * 64


def test_the_ceiling_survives_a_checkpoint() -> None:
    batch = adaptive()
    with pytest.warns(UserWarning, match="ran out of memory"):
        fit([batch], module=Small(), train=loader(400), max_epochs=1)
    again = adaptive()
    again.load_state_dict(batch.state_dict())
    assert again.batch.controller.largest_micro_batch == 8
