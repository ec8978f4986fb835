"""Scales and biases: where the papers start, the cap, which of them are trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_ext.losses import CLIPLoss, InfoNCELoss, NTXentLoss, SigLIPLoss


def test_they_start_where_the_papers_do() -> None:
    clip, siglip = CLIPLoss(), SigLIPLoss()
    assert clip.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert clip.max_scale == 100
    assert siglip.log_scale.item() == pytest.approx(math.log(10))
    assert siglip.bias.item() == -10
    assert (InfoNCELoss().temperature, NTXentLoss().temperature) == (0.07, 0.1)


@pytest.mark.parametrize("kind", [CLIPLoss, SigLIPLoss])
def test_they_are_trained_unless_told_otherwise(kind: type[CLIPLoss] | type[SigLIPLoss]) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    for learnable in (True, False):
        loss = kind(learnable=learnable)
        loss(x, x).backward()
        assert all((p.grad is not None) is learnable for p in loss.parameters())
        assert "log_scale" in loss.state_dict()


def test_the_loss_goes_down_with_the_scale_alone() -> None:
    loss, x = CLIPLoss(), F.normalize(torch.randn(8, 4))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(x, x)
    for _ in range(10):
        optimizer.zero_grad()
        loss(x, x).backward()
        optimizer.step()
    assert loss(x, x) < before / 2


def test_the_scale_stops_at_its_cap_and_can_come_down_from_beyond() -> None:
    loss, x = CLIPLoss(max_scale=20.0), torch.eye(4)
    with torch.no_grad():
        loss.log_scale.fill_(math.log(30.0))
    assert loss.scale.item() == pytest.approx(20.0)
    loss(x, x).backward()  # all match: only the cap keeps the scale from growing
    assert loss.log_scale.grad is not None
    assert loss.log_scale.grad.item() == 0
    loss(x, x.roll(1, 0)).backward()  # none does
    assert loss.log_scale.grad.item() > 1


def test_under_the_cap_the_gradient_is_that_of_the_formula() -> None:
    loss, x, y = CLIPLoss().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()

    def at(log_scale: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(loss, {"log_scale": log_scale}, (x, y))

    assert torch.autograd.gradcheck(at, loss.log_scale.detach().requires_grad_())


def test_it_says_how_it_was_set() -> None:
    assert "max_scale=50.0" in repr(CLIPLoss(max_scale=50.0))
    assert "gather_features=False" in repr(SigLIPLoss(gather_features=False))
    assert "temperature=0.3" in repr(InfoNCELoss(0.3))
    assert "normalize=False" in repr(NTXentLoss(normalize=False))
