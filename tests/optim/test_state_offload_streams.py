"""The order of OffloadedStates' copies, by streams that come at the last moment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.late_streams import LateStreams
from harness.offload_cases import BASES, Run, adamw, alike, same
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_ext.optim import LAWN, BatchScaling, OffloadedStates
from lightning_ext.optim._offload import _offloaded_states
from lightning_ext.optim._offload._lanes import Lanes

every_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStreams:
    streams = LateStreams()
    monkeypatch.setattr(_offloaded_states, "streams_of", lambda _: streams)
    return streams


@every_base
def test_copies_that_come_at_the_last_moment_change_nothing(base: str, late: LateStreams) -> None:
    plain, run = Run(BASES[base]).steps(7), Run(BASES[base], 1).steps(7)
    assert same(run, plain)
    assert alike(run.optimizer.state_dict(), plain.optimizer.state_dict())


class WithoutBegin(Lanes):
    def begin(self) -> None: ...


class WithoutStored(Lanes):
    def fetch(self, slot: int, pairs: Any) -> None:
        self._stored.clear()
        super().fetch(slot, pairs)


class WithoutReady(Lanes):
    def ready(self, slot: int) -> None: ...


class WithoutWait(Lanes):
    def wait(self) -> None: ...


def now_and_then(make: Callable[[list[Parameter]], Optimizer]) -> tuple[list[Parameter], Any]:
    """Four parameters, three of which have a gradient at every second step, after seven steps."""
    params = [Parameter(torch.full((3,), 1.0 + i)) for i in range(4)]
    optimizer = make(params)
    for t in range(7):
        for p in params[3:] if t % 2 else params:
            p.grad = p.detach().sin()
        optimizer.step()
        optimizer.zero_grad()
    return params, optimizer.state_dict()


@pytest.mark.parametrize("broken", [Lanes, WithoutBegin, WithoutStored, WithoutReady, WithoutWait])
def test_no_wait_is_idle(
    broken: type[Lanes], late: LateStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, expected = now_and_then(lambda x: torch.optim.Adam(x, lr=0.1))
    monkeypatch.setattr(_offloaded_states, "Lanes", broken)
    found, states = now_and_then(
        lambda x: OffloadedStates(torch.optim.Adam(x, lr=0.1), chunk_bytes=1)
    )
    is_right = all(map(torch.equal, found, truth)) and alike(states, expected)
    assert is_right == (broken is Lanes)


def test_a_step_copies_the_next_chunk_in_before_it_updates_one(late: LateStreams) -> None:
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer = OffloadedStates(base, chunk_bytes=1)
    base.register_step_pre_hook(lambda *_: late.log.append("update"))
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(2)
        late.log.clear()
        optimizer.step()
    first, last = ["in copies"], ["out waits for step", "out copies"]
    assert late.log == [
        *("in waits for out", "in waits for step"),
        *(*first, "in copies", "step waits for in", "update", *last),
        *("in waits for out", "in copies", "step waits for in", "update", *last),
        *("step waits for in", "update", *last),
    ]


def test_reading_states_waits_for_them(late: LateStreams) -> None:
    run, plain = Run(adamw, 1).steps(4), Run(adamw).steps(4)
    for p, expected in plain.optimizer.state.items():
        mine = run.params[next(i for i, x in enumerate(plain.params) if x is p)]
        assert alike(dict(run.optimizer.state[mine]), expected)


def test_a_wrapper_goes_around_it(late: LateStreams) -> None:
    runs = [Run(adamw), Run(adamw, 1)]
    for run in runs:
        run.optimizer = LAWN(run.optimizer, free_steps=2)
        scaling = BatchScaling(run.optimizer, scale_second_moment=True)
        run.steps(3)
        scaling.set_kappa(2.0)
    copied = copy.deepcopy(runs[1]).steps(3)
    assert same(*(run.steps(3) for run in runs))
    assert not same(copied, runs[0])  # at the rate of the batch before
    assert alike(*(run.optimizer.state_dict()["state"] for run in runs))
