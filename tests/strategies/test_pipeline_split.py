"""Which submodule is split, and where stages begin."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import Chain, data, pipeline_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ext.strategies._pipeline._layers import find_layers
from lightning_ext.strategies._pipeline._split import first_layers


class Declared(nn.Module):
    """Has its layers in an attribute of another name."""

    def __init__(self, *layers: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(one for one in layers if isinstance(one, nn.Module))
        self.given = layers

    def pipeline_layers(self) -> list[Any]:
        return list(self.given)


class Root(LightningModule):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def row(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for width in widths))


def test_the_only_sequence_is_found() -> None:
    net = row(2, 2)
    found = find_layers(Root(first=nn.Linear(2, 2), net=net), None)
    assert found.name == "net"
    assert found.members == tuple(net)


def test_the_outermost_sequence_is_found() -> None:
    assert find_layers(Root(net=nn.Sequential(row(2), row(2))), None).name == "net"


def test_what_declares_its_layers_goes_before_sequences() -> None:
    found = find_layers(Root(other=row(2), net=Declared(*row(2, 2))), None)
    assert found.name == "net"
    assert found.unpacks


class Overridden(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("root", "name", "told"),
    [
        (Root(a=row(2), b=row(2)), None, "module= does not say which is split.*: 'a', 'b'. Hint"),
        (Root(a=nn.Linear(2, 2)), None, "module= does not say which is split.*: none here"),
        (Root(a=row(2)), "c", "module='c' is not in it.*: 'a'"),
        (Root(a=nn.Linear(2, 2)), "a", "module='a' is a Linear without them"),
        (Root(a=Overridden()), "a", "module='a' is a Overridden without them"),
        (Root(a=nn.Sequential()), None, "The layers of module='a' are none"),
        (Root(a=Declared(3)), None, r"The layers of module='a' are \['int'\]; allowed are one or"),
    ],
    ids=["several", "none", "another name", "no layers", "its own forward", "empty", "numbers"],
)
def test_what_cannot_be_split_is_refused(root: Root, name: str | None, told: str) -> None:
    with pytest.raises(MisconfigurationException, match=told):
        find_layers(root, name)


def in_place(net: nn.Sequential) -> nn.Sequential:
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("name", [None, "net"])
@pytest.mark.parametrize("compiled", [lambda net: torch.compile(net, backend="eager"), in_place])
def test_a_submodule_that_is_compiled_as_a_whole_is_refused(name: Any, compiled: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"is compiled as a whole.*layer.compile"):
        find_layers(Root(net=compiled(row(2, 2))), name)


def test_layers_may_be_compiled() -> None:
    net = row(2, 2)
    for layer in net:
        layer.compile(backend="eager")
    assert find_layers(Root(net=net), None).members == tuple(net)


WIDTHS = row(9, 1, 1, 1, 1, 5)


@pytest.mark.parametrize(
    ("split", "starts"),
    [("uniform", [0, 2, 4]), ("params", [0, 1, 5]), ([2, 3], [0, 2, 3]), ((1, 2), [0, 1, 2])],
    ids=str,
)
def test_stages_begin_where_the_split_says(split: Any, starts: list[int]) -> None:
    assert first_layers(list(WIDTHS), 3, split) == starts


def test_times_are_balanced() -> None:
    assert first_layers(list(WIDTHS), 2, "time", [1.0, 1.0, 1.0, 1.0, 1.0, 5.0]) == [0, 5]


@pytest.mark.parametrize("split", [[1], [1, 2, 3], [1, 6]], ids=str)
def test_a_split_by_hand_must_make_the_stages_that_there_are(split: list[int]) -> None:
    with pytest.raises(MisconfigurationException, match=r"3 stages of 6 layers; allowed are 2 asc"):
        first_layers(list(WIDTHS), 3, split)


class Slow(nn.Module):
    """Takes its time, in the forward and in the backward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = nn.Linear(10, 10).double(), seconds
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        found = self.inner(x + torch.rand_like(x))
        if found.requires_grad:
            found.register_hook(self._wait)
        return found

    def _wait(self, grad: Tensor) -> None:
        time.sleep(self.seconds)


class Timed(Chain):
    def __init__(self, *seconds: float, example: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(*map(Slow, seconds))
        self.example_input_array = example


class Ready(NamedTuple):
    """A rank after it was set up."""

    layers: list[int]
    calls: float
    gradients: int
    draw: float


def set_up(*seconds: float, example: bool = True, **options: Any) -> Ready:
    array = torch.zeros(2, 6, dtype=torch.float64) if example else None
    module = Timed(*seconds, example=array)
    run = pipeline_trainer({"split": "time", "stages_per_rank": 1, **options}, max_steps=0)
    torch.manual_seed(3)
    run.fit(module, DataLoader(data(), 16))
    held = [i for i, one in enumerate(module.net) if one.inner.weight is not None]
    calls = sum(float(one.calls) for one in module.net if one.calls is not None)
    grads = sum(p.grad is not None for p in module.parameters())
    return Ready(held, calls, grads, float(torch.rand(())))


def slow_start() -> Ready:
    return set_up(0.03, 0.0, 0.0, 0.0)


def test_stages_are_balanced_by_measured_time() -> None:
    assert [one.layers for one in run_distributed(slow_start)] == [[0], [1, 2, 3]]


def not_measured() -> Ready:
    return set_up(0.0, 0.0, 0.0, 0.0, split="uniform")


def test_measuring_leaves_no_trace() -> None:
    pairs = zip(run_distributed(slow_start), run_distributed(not_measured), strict=True)
    for one, other in pairs:
        assert (one.calls, one.gradients) == (0, 0)
        assert one.draw == other.draw


def without_an_example() -> None:
    set_up(0.0, 0.0, example=False)


def test_time_is_measured_on_an_example() -> None:
    ends = run_distributed(without_an_example, return_exceptions=True)
    assert [type(one) for one in ends] == [MisconfigurationException] * 2
    assert all("Timed.example_input_array is None" in str(one) for one in ends)


class Failing(Slow):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("of a user")


def failing_example() -> None:
    module = Timed(0.0, 0.0, example=torch.zeros(2, 6, dtype=torch.float64))
    module.net[1] = Failing(0.0)
    run = pipeline_trainer({"split": "time", "stages_per_rank": 1}, max_steps=0)
    run.fit(module, DataLoader(data(), 16))


def test_a_layer_that_fails_while_it_is_measured_fails_on_all_ranks() -> None:
    ends = run_distributed(failing_example, return_exceptions=True)
    assert [type(one) for one in ends] == [MisconfigurationException] * 2
    assert all("KeyError: 'of a user'" in str(one) for one in ends)
