"""OffloadedStates: the base to the bit, checkpoints, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.offload_cases import BASES, TOGETHER, Run, adamw, alike, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from lightning_ext import optim
from lightning_ext.optim import LAWN, BatchScaling, OffloadedStates

WHOLE = 2**40
sizes = pytest.mark.parametrize("chunk_bytes", [1, 45_000, WHOLE])
every_base = pytest.mark.parametrize("base", BASES)


@sizes
@every_base
def test_it_is_the_base_to_the_bit(base: str, chunk_bytes: int) -> None:
    plain, run = Run(BASES[base]).steps(7), Run(BASES[base], chunk_bytes).steps(7)
    assert same(run, plain)
    assert alike(run.optimizer.state_dict(), plain.optimizer.state_dict())


@pytest.mark.parametrize("base", TOGETHER)
def test_lists_that_are_updated_as_one_agree_to_rounding(base: str) -> None:
    plain, run = Run(TOGETHER[base]).steps(7), Run(TOGETHER[base], 1).steps(7)
    found, truth = (torch.cat([p.detach().flatten() for p in x.params]) for x in (run, plain))
    assert (found - truth).norm() <= 1e-6 * truth.norm()


@every_base
def test_a_checkpoint_goes_on_to_the_bit_in_both_directions(base: str) -> None:
    plain, first = Run(BASES[base]).steps(4), Run(BASES[base], 45_000).steps(4)
    for source, chunk_bytes in ((first, 1), (first, None), (plain, 45_000)):
        second = Run(BASES[base], chunk_bytes)
        for mine, other in zip(second.params, source.params, strict=True):
            mine.data.copy_(other.data)
        second.optimizer.load_state_dict(source.saved())
        second.taken = 4
        assert same(second.steps(3), Run(BASES[base]).steps(7))


def test_copies_go_on_alike() -> None:
    run = Run(BASES["CAME, int8"], 45_000).steps(4)
    copied = copy.deepcopy(run)
    assert same(run.steps(3), copied.steps(3))
    assert run.optimizer.base is not copied.optimizer.base


def test_schedulers_and_batches_move_it_as_they_move_the_base() -> None:
    runs = [Run(adamw), Run(adamw, 1)]
    for run in runs:
        scaling = BatchScaling(run.optimizer, scale_second_moment=True)
        schedules = [
            ExponentialLR(run.optimizer, 0.9),
            OneCycleLR(run.optimizer, 0.02, total_steps=20),
        ]
        for kappa in (1.0, 4.0, 0.5):
            scaling.set_kappa(kappa)
            run.steps(2)
            for schedule in schedules:
                schedule.step()
    assert same(*runs)
    counts = [run.optimizer.state[run.params[0]]["step"] for run in runs]
    assert counts[0] == counts[1] != 6


def test_a_group_may_come_later() -> None:
    runs = [Run(adamw), Run(adamw, 1)]
    for run in runs:
        run.steps(2)
        run.params.append(Parameter(torch.ones(4, 4)))
        run.optimizer.add_param_group({"params": run.params[-1:], "lr": 0.1})
        run.steps(3)
    assert same(*runs)


def test_states_that_others_replace_are_taken() -> None:
    runs = [Run(adamw), Run(adamw, 45_000)]
    for run in runs:
        run.steps(3)
        state = run.optimizer.state
        state[run.params[2]]["exp_avg"] = torch.ones(96, 64)
        state[run.params[0]] = {**state[run.params[0]], "exp_avg_sq": torch.ones(5, 7)}
        run.steps(3)
    assert same(*runs)


def test_a_step_that_raises_leaves_groups_and_states_as_they_are() -> None:
    run = Run(adamw, 1).steps(2)
    groups = [list(x["params"]) for x in run.optimizer.param_groups]
    run.params[0].grad = torch.ones(5, 7).to_sparse()
    with pytest.raises(RuntimeError):
        run.optimizer.step()
    assert [list(x["params"]) for x in run.optimizer.param_groups] == groups
    assert len(run.optimizer._chunks) == 4
    run.steps(1)


def test_a_chunk_holds_as_many_bytes_as_it_may_and_buffers_no_more() -> None:
    run = Run(adamw, 60_000).steps(5)
    held = [
        sum(x.nbytes for y in c.home.values() for x in y.values()) for c in run.optimizer._chunks
    ]
    assert len(held) > 1
    assert max(held) <= 60_000
    largest = max(x.nbytes for x in run.optimizer._chunks)
    assert [x.nbytes for x in run.optimizer._buffers] == [largest, largest]


def test_what_it_refuses_it_names() -> None:
    w = Parameter(torch.ones(2, 2))
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"AdaGradNorm is not known"):
        OffloadedStates(optim.AdaGradNorm([w]))
    with pytest.raises(TypeError, match=r"DistributedLion is not known"):
        OffloadedStates(optim.DistributedLion([w]))
    with pytest.raises(TypeError, match=r"Hint: LAWN\(OffloadedStates"):
        OffloadedStates(LAWN(sgd, free_steps=1))
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0.*clip before"):
        OffloadedStates(optim.LAMB([w], form="nvlamb"))
    with pytest.raises(ValueError, match="chunk_bytes=0"):
        OffloadedStates(torch.optim.SGD([w], lr=0.1), chunk_bytes=0)


class Own(Optimizer):
    """One that says of itself that it steps by parameter."""

    steps_by_parameter = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["last"] = p.grad.clone()  # another tensor at every step
                    self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
                    p.sub_(self.state[p]["last"], alpha=group["lr"])


def test_an_optimizer_may_say_itself_that_it_steps_by_parameter() -> None:
    plain, run = Run(Own).steps(5), Run(Own, 1).steps(5)
    assert same(plain, run)
    assert alike(plain.optimizer.state_dict(), run.optimizer.state_dict())


def sharded() -> str:
    torch.distributed.init_process_group("gloo")
    net = nn.Linear(4, 4)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    try:
        OffloadedStates(adamw([{"params": list(net.parameters())}]))
    except TypeError as error:
        return str(error)
    return ""


def test_shards_are_refused() -> None:
    assert all("CPUOffloadPolicy" in x for x in run_distributed(sharded, 2))
