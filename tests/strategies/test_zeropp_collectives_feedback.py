"""What error feedback keeps, and what it is worth."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.thread_ranks import ThreadRanks
from torch import Tensor

from lightning_ext.strategies import QuantizedReduceScatter

CHUNK = 100
NODES = {"one hop": (4, 4), "two hops": (4, 2)}


class Reductions:
    """One reduction on each rank, and what they have together."""

    def __init__(self, ranks: ThreadRanks, **settings: Any) -> None:
        self.ranks = ranks
        self.made = [
            QuantizedReduceScatter(ranks.node_groups(rank), **settings)
            for rank in range(ranks.world)
        ]

    def __call__(self, grads: Tensor) -> Tensor:
        def one(rank: int) -> Tensor:
            output = grads.new_empty(grads.shape[-1])
            flat, group = grads[rank].flatten(), self.ranks.group
            self.made[rank](output, flat, group, dist.ReduceOp.AVG)  # type: ignore[arg-type]
            return output

        return torch.stack(self.ranks.run(one))

    def mean(self, grads: Tensor, steps: int) -> Tensor:
        return torch.stack([self(grads) for _ in range(steps)]).mean(0)


def gradients(world: int = 4, chunk: int = CHUNK) -> Tensor:
    return torch.randn(world, world, chunk, generator=torch.Generator().manual_seed(1))


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_the_mean_of_steps_is_the_gradient_and_without_feedback_keeps_its_error(
    shape: tuple[int, int], beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, grads, steps = ThreadRanks(*shape, monkeypatch), gradients(), 40
    truth = grads.mean(0)
    found = Reductions(ranks, error_feedback=True, error_beta=beta).mean(grads, steps)
    hops = 1 if shape[0] == shape[1] else 2
    # An error is at most half a step, max|h|/14. As h = g + e, max|h| is at most 14/13 of max|g|
    # in the first hop, and in the second 14/13 of that.
    half_step = grads.abs().amax() * (14 / 13) ** hops / 14
    assert (found - truth).abs().amax() <= hops * half_step / (steps * (1 - beta))
    plain = Reductions(ranks).mean(grads, steps)
    assert distance(plain, truth) > 0.1
    assert distance(found, truth) < 0.35 * distance(plain, truth)


@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_errors_in_eight_bits_leave_little_of_the_bias(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, grads = ThreadRanks(*shape, monkeypatch), gradients()
    made = Reductions(ranks, error_feedback=True, error_beta=0.0, error_format="int8")
    assert distance(made.mean(grads, 40), grads.mean(0)) < 0.01


@pytest.mark.parametrize(("format", "per_entry"), [("float32", 4.0), ("int8", 1 + 4 / 256)])
def test_errors_take_the_bytes_that_are_stated(
    format: str, per_entry: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ThreadRanks(4, 2, monkeypatch)
    made = Reductions(ranks, error_feedback=True, error_format=format)
    made(gradients(4, 512))
    errors = made.made[0].state_dict()["errors"]
    tensors = [x for error in errors for x in error.values() if isinstance(x, Tensor)]
    entries = 4 * 512 + 4 * 512 // 2
    assert sum(x.nbytes for x in tensors) == per_entry * entries


def test_errors_start_at_zero_after_so_many_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients()
    made = Reductions(ranks, error_feedback=True, error_beta=0.0, error_reset_every=3)
    found = [made(grads) for _ in range(6)]
    assert not found[0].equal(found[1])
    assert all(found[step].equal(found[step + 3]) for step in range(3))


def test_an_overflow_is_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients()
    made = Reductions(ranks, error_feedback=True)
    made(grads)
    bad = grads.clone()
    bad[0, 3, 5] = torch.inf
    assert made(bad)[3].isnan().all()
    assert made(grads).isfinite().all()


def test_chunks_of_another_length_start_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, other = ThreadRanks(4, 2, monkeypatch), gradients(chunk=64)
    made = Reductions(ranks, error_feedback=True)
    made(gradients())
    assert made(other).equal(Reductions(ranks)(other))


SETTINGS: list[dict[str, Any]] = [
    {"error_feedback": True},
    {"error_feedback": True, "error_format": "int8", "error_reset_every": 4},
    {"seed": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["float32", "int8", "random"])
def test_saved_loaded_and_gone_on_is_uninterrupted(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients()
    whole, second = (Reductions(ranks, **settings) for _ in range(2))
    for _ in range(3):
        whole(grads)
    for old, new in zip(whole.made, second.made, strict=True):
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        assert new.load_state_dict(torch.load(file, weights_only=True))
    assert all(whole(grads).equal(second(grads)) for _ in range(3))


def test_errors_of_other_nodes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients()
    old = Reductions(ThreadRanks(4, 4, monkeypatch), error_feedback=True)
    old(grads)
    ranks = ThreadRanks(4, 2, monkeypatch)
    new = Reductions(ranks, error_feedback=True)
    states = [x.state_dict() for x in old.made]
    assert not any(x.load_state_dict(s) for x, s in zip(new.made, states, strict=True))
    assert new(grads).equal(Reductions(ranks)(grads))


def test_errors_can_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, grads = ThreadRanks(4, 2, monkeypatch), gradients()
    made = Reductions(ranks, error_feedback=True)
    first = made(grads)
    for one in made.made:
        one.reset()
    assert made(grads).equal(first)
