"""What torch's engine is given: boundaries of every kind, and no more memory than it needs."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import (
    COUNT,
    MICRO,
    Chain,
    by_one,
    by_pipeline,
    distance,
    pipeline_trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleGPipe
from torch.utils.data import DataLoader, TensorDataset

TAKES_INTEGERS = "loss_kwargs" in inspect.signature(ScheduleGPipe.step).parameters


class Turned(nn.Module):
    """Gives its columns as rows, and takes them so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.shape[-1] == 10 else x.T
        return torch.tanh(self.linear(x)).T


class Last(nn.Module):
    """Undoes the last turn."""

    def forward(self, x: Tensor) -> Tensor:
        return x.T


class Pairs(nn.Sequential):
    """Layers that hand two tensors on, of which the second is not always used."""

    def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
        super().__init__(*(nn.Linear(10, 10) for _ in range(4)))
        self.second = second

    def pipeline_layers(self) -> list[nn.Module]:
        first = Pair(self[0], self.second)
        return [first, Handed(self[1]), Handed(self[2]), Joined(self[3])]

    def forward(self, x: Tensor) -> Tensor:
        first, *middle, last = self.pipeline_layers()
        found = first(x)
        for layer in middle:
            found = layer(*found)
        return last(*found)


class Pair(nn.Module):
    def __init__(self, linear: nn.Module, second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.second = linear, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.second(x)


class Handed(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.linear(x)), second


class Joined(Handed):
    def forward(self, x: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]  # one alone
        if not second.is_floating_point():
            x = x * second
        return self.linear(x)


def integers(x: Tensor) -> Tensor:
    return (x > 0).long()


def unused(x: Tensor) -> Tensor:
    return 2 * x


NETS: dict[str, Callable[[], nn.Module]] = {
    "turned": lambda: nn.Sequential(*(Turned() for _ in range(3)), Last()),
    "integers": lambda: Pairs(integers),
    "unused": lambda: Pairs(unused),
}


def chain(name: str) -> Chain:
    module = Chain()
    torch.manual_seed(1)
    module.net = NETS[name]().double()
    return module


def fitted(name: str, schedule: Any) -> dict[str, Tensor]:
    options = {"schedule": schedule, "stages_per_rank": 1 if schedule == "1f1b" else 2}
    return by_pipeline(chain(name), options).weights


@pytest.mark.parametrize("schedule", ["breadth_first", "1f1b"])
@pytest.mark.parametrize("name", ["turned", "unused"])
def test_a_boundary_may_be_of_any_layout_and_not_used(name: str, schedule: str) -> None:
    truth = by_one(chain(name)).weights
    for weights in run_distributed(fitted, args=(name, schedule)):
        assert distance(weights, truth) <= 1e-10


def test_integers_go_from_stage_to_stage_where_torch_has_it() -> None:
    if not TAKES_INTEGERS:
        with pytest.raises(MisconfigurationException, match=r"int64.*torch 2\.13"):
            run_distributed(fitted, args=("integers", "breadth_first"))
        return
    truth = by_one(chain("integers")).weights
    for weights in run_distributed(fitted, args=("integers", "breadth_first")):
        assert distance(weights, truth) <= 1e-10


class Room(Callback):
    """Counts tensors of the shape of what is received or computed, between batches."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        gc.collect()
        kept = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (MICRO, 10)]
        self.found.append(len(kept))


def room(schedule: str) -> list[int]:
    """Tensors before each batch, of which the third and fourth have twice the micro-batches."""
    seen = Room()
    sizes = [COUNT, COUNT, 2 * COUNT, 2 * COUNT, COUNT, COUNT, COUNT]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MICRO * sum(sizes), 6, generator=generator).double()
    data = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    ends = torch.tensor(sizes).mul(MICRO).cumsum(0).tolist()
    batches = [list(range(end - size * MICRO, end)) for end, size in zip(ends, sizes, strict=True)]
    run = pipeline_trainer({"schedule": schedule}, callbacks=[seen], max_epochs=1)
    run.fit(Chain(), DataLoader(data, batch_sampler=batches))
    return seen.found


@pytest.mark.parametrize("schedule", ["breadth_first", "1f1b"])
def test_room_for_what_is_received_follows_the_number_of_micro_batches(schedule: str) -> None:
    for found in run_distributed(room, args=(schedule,)):
        _, few, _, _, many, _, again = found
        assert few < many
        assert again == few
