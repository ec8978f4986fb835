"""What tensors and containers held comes back in place."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ext._lightning._snapshot import Snapshot


def test_a_tensor_keeps_its_place_and_every_bit() -> None:
    tensor = torch.tensor([1.0, -0.0, float("nan")])
    place = tensor.data_ptr()
    before = Snapshot([tensor])
    tensor.zero_()
    before.restore()
    assert tensor.data_ptr() == place
    assert torch.equal(
        tensor.view(torch.int32), torch.tensor([1.0, -0.0, torch.nan]).view(torch.int32)
    )


@pytest.mark.parametrize(
    ("container", "change"),
    [
        ({"b": 1, "a": [2]}, lambda x: (x.pop("b"), x["a"].append(3), x.update(c=4))),
        ([1, {"k": {2}}], lambda x: (x[1]["k"].add(5), x.append(2))),
        ({1, 2}, lambda x: x.clear()),
        (deque([1, 2], maxlen=2), lambda x: x.append(3)),
        (defaultdict(list, a=[1]), lambda x: x["b"].append(2)),
        (OrderedDict(a=1, b=2), lambda x: x.move_to_end("a")),
        (Counter("aab"), lambda x: x.update("b")),
        (([1], [2]), lambda x: x[0].append(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_come_back(container: Any, change: Any) -> None:
    shown, kind = repr(container), type(container)
    before = Snapshot(container)
    change(container)
    assert repr(container) != shown
    before.restore()
    assert repr(container) == shown
    assert type(container) is kind


def test_it_may_be_restored_again() -> None:
    state = {"buffer": torch.ones(2)}
    before = Snapshot(state)
    for _ in range(2):
        state["buffer"].fill_(7)
        state["other"] = torch.zeros(1)
        before.restore()
        assert state.keys() == {"buffer"}
        assert state["buffer"].tolist() == [1, 1]


def test_a_container_that_holds_itself() -> None:
    knot: list[Any] = [1]
    knot.append(knot)
    before = Snapshot(knot)
    knot.clear()
    before.restore()
    assert knot[1] is knot


def test_a_module_and_what_an_optimizer_remembers() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(net.parameters())
    saved = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = Snapshot(vars(optimizer), *(vars(module) for module in net.modules()))
    net(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    net[1].running_mean = torch.ones(2)
    net[0].register_buffer("extra", torch.ones(1))
    before.restore()
    assert not optimizer.state
    assert net.state_dict().keys() == saved.keys()
    assert all(torch.equal(net.state_dict()[name], saved[name]) for name in saved)


def test_tensors_that_cannot_be_written_in_place_are_left_alone() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 2).sum()
    kept = [loss, torch.ones(1).expand(3), torch.ones(2, device="meta"), torch.eye(2).to_sparse()]
    Snapshot(kept).restore()
    loss.backward()
    assert weight.grad is not None
