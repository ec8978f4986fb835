"""Ranks of a pipeline that are killed, late or end with an error in the middle of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_faults import SIZE, Own, batches, fail, fitting, loader, weights
from harness.pipeline_parts import Chain
from torch import Tensor


def fail_late(kind: str, step: int, where: int, **options: Any) -> None:
    module = Chain()

    def strike(x: Tensor) -> Tensor:
        if module.trainer.global_step == step and torch.is_grad_enabled():
            if kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "hang":
                time.sleep(5)
            elif kind == "raise":
                raise KeyError("of a user")
        return x

    module.net[where] = Own(strike)
    timeout = timedelta(seconds=2 if kind == "hang" else 30)
    weights(module, batches(*[SIZE] * 4), timeout=timeout, **options)


def collated() -> None:
    def collate(batch: Any) -> Any:
        fail(1)
        return batch

    run = fitting()
    run.fit(Chain(), loader(batches(SIZE), collate))


def ends_of(function: Callable[..., Any], *args: Any) -> list[tuple[type, str, str]]:
    """Kind, text and notes of the error of each rank."""
    ends = run_distributed(function, args=args, return_exceptions=True, timeout=30)
    return [(type(one), str(one), "\n".join(getattr(one, "__notes__", []))) for one in ends]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_the_middle_is_raised_as_it_is_and_ends_the_others(failing: int) -> None:
    ends = ends_of(fail_late, "raise", 2, failing)
    assert ends[failing][:2] == (KeyError, "'of a user'")
    assert "lost the others in a collective" in ends[1 - failing][2]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_killed_rank_ends_the_others(failing: int) -> None:
    ends = ends_of(fail_late, "die", 2, failing)
    assert "exit code -9" in ends[failing][1]
    assert "was killed" in ends[1 - failing][2]


def test_a_rank_that_is_not_heard_of_ends_all_within_the_timeout() -> None:
    ends = ends_of(fail_late, "hang", 2, 1)
    assert "Timed out waiting 2000ms" in ends[0][1]
    assert "timeout=0:00:02" in ends[0][2]
    assert "lost the others in a collective" in ends[1][2]


def hang_of_a_replica() -> float:
    """Seconds until this rank has ended, since another one has hung."""
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        fail_late("hang", 2, 1, data_parallel_size=2)
    return time.monotonic() - start


def test_groups_of_some_ranks_wait_no_longer() -> None:
    started, *_ = sorted(run_distributed(hang_of_a_replica, 4, timeout=30))
    assert started < 5.0


def test_an_error_of_a_loader_on_one_rank_ends_the_others() -> None:
    ends = ends_of(collated)
    assert ends[1][:2] == (KeyError, "'of a user'")
    assert "ended with an error of its own" in ends[0][2]
