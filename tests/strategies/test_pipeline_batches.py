"""Batches and layers that a pipeline takes, and those that look alike and are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.pipeline_faults import SIZE, Batches, Own, batches, fail, loader, rank, weights
from harness.pipeline_parts import COUNT, MICRO, Chain, data, distance, whole
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F


class Structured(Chain):
    """Takes batches of other structures."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = pick(batch)
        return F.cross_entropy(self(x), y)


def pick(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        assert len(batch.get("names", batch["x"])) == len(batch["x"])
        return batch["x"], batch["y"]
    x, y = batch
    return (x, y[1] + y[0]) if isinstance(y, tuple) else (x, y["of"][0])


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a tuple as target": lambda x, y: (x, (torch.zeros_like(y), y)),
    "a dict": lambda x, y: {"x": x, "y": y},
    "nested": lambda x, y: (x, {"of": [y, y]}),
    "with texts": lambda x, y: {"x": x, "y": y, "names": [str(i) for i in range(len(x))]},
    "with a number": lambda x, y: {"x": x, "y": y, "temperature": 0.5},
}


def structured() -> list[dict[str, Tensor]]:
    return [
        weights(Structured(), [form(*one) for one in batches(SIZE, SIZE)])
        for form in STRUCTURES.values()
    ]


def test_batches_of_any_structure_are_cut() -> None:
    """All hold the same samples, so that the same comes of them."""
    for found in run_distributed(structured):
        assert all(distance(one, found[0]) == 0 for one in found[1:])


class Lengths(Chain):
    """Its samples are sequences, of one length in each batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def sequences(*lengths: int, replicas: int = 1, replica: int = 0) -> Batches:
    found = []
    for length in lengths:
        x, y = (one[replica:SIZE:replicas] for one in data().tensors)
        found.append((torch.stack([x * (1 + i) for i in range(length)], 1), y))
    return found


def of_lengths() -> dict[str, Tensor]:
    return weights(Lengths(), sequences(3, 2, 5, 3))


def test_batches_may_have_other_lengths() -> None:
    one = Lengths()
    micro = [
        (x[i : i + MICRO], y[i : i + MICRO])
        for x, y in sequences(3, 2, 5, 3)
        for i in range(0, SIZE, MICRO)
    ]
    run = trainer(accumulate_grad_batches=COUNT, limit_val_batches=0)
    run.fit(one, loader(micro))
    for found in run_distributed(of_lengths):
        assert distance(found, whole(one)) < 1e-12


def on_replicas(data_parallel: str, failing: bool) -> dict[str, Tensor]:
    """The replicas have sequences of different lengths, at different times."""
    replica = rank() // 2
    lengths = (3, 3, 2) if replica else (3, 2, 2)
    module = Lengths()
    if failing:
        inner = module.net[2]
        module.net[2] = Own(lambda x: inner(x) if x.shape[1] == 3 else fail() or x, inner)
    own = sequences(*lengths, replicas=2, replica=replica)
    return weights(module, own, data_parallel=data_parallel, data_parallel_size=2)


@pytest.mark.parametrize("data_parallel", ["fsdp2", "ddp"])
def test_replicas_may_have_other_lengths_at_other_times(data_parallel: str) -> None:
    found = run_distributed(on_replicas, 4, args=(data_parallel, False))
    shared = [{"head.weight": one["head.weight"]} for one in found]
    assert all(distance(one, shared[0]) < 1e-15 for one in shared)


def test_an_error_of_one_replica_is_raised_on_all() -> None:
    ends = run_distributed(on_replicas, 4, args=("fsdp2", True), return_exceptions=True)
    assert [type(one) for one in ends] == [MisconfigurationException] * 4
    assert all("of a user" in str(one) for one in ends)


class Keeping(Chain):
    """Keeps what nobody else reads, and a table that each layer can make again."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        for index in range(5):
            self.net[index] = Own(self.layer(self.net[index]), self.net[index])

    def layer(self, inner: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones_like(x[:1])
            inner.seen = inner(x)
            return inner.seen * self.table

        return run


def keeping() -> dict[str, Tensor]:
    return weights(Keeping(), batches(SIZE))


def test_a_layer_may_keep_what_no_other_one_reads() -> None:
    run_distributed(keeping)


class Tied(Chain):
    """Layers of two stages on one rank, and of two ranks, have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2][0].weight = self.net[3][0].weight = self.net[0][0].weight


def tied() -> dict[str, Tensor]:
    return weights(Tied(), batches(SIZE))


def test_tied_weights_are_no_skip() -> None:
    run_distributed(tied)


def beside_modules(replicas: int) -> None:
    """A later stage of the same rank takes what no module keeps."""
    module, kept = Chain(), []
    inner = module.net[1]

    def keep(x: Tensor) -> Tensor:
        kept.append(inner(x))
        return kept[-1]

    module.net[1] = Own(keep, inner)
    module.net[3] = Own(lambda x: x + kept[-1])
    weights(module, batches(SIZE), data_parallel_size=replicas)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_skip_beside_all_modules_is_refused(replicas: int) -> None:
    """Under FSDP2, too, where parameters are gathered for a stage."""
    ends = run_distributed(beside_modules, 2 * replicas, args=(replicas,), return_exceptions=True)
    assert [type(one) for one in ends] == [MisconfigurationException] * 2 * replicas
    assert all("stage 3 takes what stage 1 has made past the stages" in str(one) for one in ends)
