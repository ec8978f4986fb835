"""Optimizers under a pipeline: the steps of one process, or a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_distributed
from harness.pipeline_parts import Chain, Fit, by_one, by_pipeline, distance
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, AdamW, Optimizer

from lightning_ext import optim

Make = Callable[[Chain], Optimizer]
ALLOWED: dict[str, Make] = {
    "LAMB": lambda m: optim.LAMB(optim.param_groups_for(m, optim.LAMB), lr=1e-2),
    "LARS": lambda m: optim.LARS(optim.param_groups_for(m, optim.LARS), lr=0.1),
    "NorMuon": lambda m: optim.NorMuon(optim.param_groups_for(m, optim.NorMuon), lr=1e-2),
    "Lion": lambda m: optim.Lion(m.parameters(), lr=1e-3),
    "AdamP": lambda m: optim.AdamP(m.parameters(), lr=1e-2),
    "SGDP": lambda m: optim.SGDP(m.parameters(), lr=0.1),
    "AccumAdam": lambda m: optim.AccumAdam(m.parameters(), lr=1e-2, every_n_steps=2),
    "DiffGrad": lambda m: optim.DiffGrad(m.parameters(), lr=1e-2),
    "Gravity": lambda m: optim.Gravity(m.parameters(), lr=1e-2, alpha=0.0),
    "LAWN": lambda m: optim.LAWN(AdamW(m.parameters(), lr=1e-2), free_steps=2),
    "DelayCompensation": lambda m: optim.DelayCompensation(
        SGD(m.parameters(), lr=0.1, momentum=0.9), delay=1, prediction=None
    ),
}
REFUSED: dict[str, Make] = {
    "AdaGradNorm": lambda m: optim.AdaGradNorm(m.parameters()),
    "PolyakSGD": lambda m: optim.PolyakSGD(m.parameters()),
    "MTAdamW": lambda m: optim.MTAdamW(m.parameters()),
    "VRGD": lambda m: optim.VRGD(SGD(m.parameters(), lr=0.1)),
    "LAMB with max_grad_norm=1.0": lambda m: optim.LAMB(
        optim.param_groups_for(m, optim.LAMB), form="nvlamb"
    ),
    "DistributedLion": lambda m: optim.DistributedLion(m.parameters()),
    "Gravity with alpha": lambda m: optim.Gravity(m.parameters(), lr=1e-2),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters()),
}


class Stepped(Chain):
    """With an optimizer of the tables."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_optimizers(self) -> Optimizer:
        """It."""
        return {**ALLOWED, **REFUSED}[self.name](self)


def stepped(name: str) -> Fit:
    """A fit on this rank."""
    return by_pipeline(Stepped(name), {}, max_epochs=1)


SHORT = ("LAMB", "LARS", "NorMuon", "Lion")


@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(n, marks=pytest.mark.slow) for n in ALLOWED if n not in SHORT)]
)
def test_what_takes_each_parameter_by_itself_steps_as_in_one_process(name: str) -> None:
    alone = by_one(Stepped(name), max_epochs=1)
    for fit in run_distributed(stepped, args=(name,)):
        assert distance(fit.weights, alone.weights) <= 1e-11


def errors() -> list[str]:
    """What the strategy says of the others."""
    texts: list[Any] = []
    for name in REFUSED:
        with pytest.raises(MisconfigurationException) as caught:
            by_pipeline(Stepped(name), {})
        texts.append(str(caught.value))
    return texts


def test_those_that_need_more_are_refused_with_a_reason_and_another() -> None:
    for texts in run_distributed(errors, timeout=120):
        for text, name in zip(texts, REFUSED, strict=True):
            assert text.startswith(name)
            assert "Hint" in text
