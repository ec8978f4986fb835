"""Modules of other forms, and in other precisions, under a pipeline against one process."""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_distributed
from harness.pipeline_parts import (
    Chain,
    by_one,
    by_pipeline,
    distance,
)
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor, nn
from torch.nn import functional as F

EXACT = 1e-12


class Explicit(Chain):
    """Says itself what goes into the layers, and what is made of what comes out."""

    def pipeline_inputs(self, batch: Any) -> Tensor:
        """Of one micro-batch."""
        return self.first(batch[0])

    def pipeline_loss(self, output: Tensor, batch: Any) -> Tensor:
        """Of one micro-batch."""
        loss = F.cross_entropy(self.head(output), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


class Pair(nn.Module):
    """Hands on a number for each sample, untouched, beside what it makes of the rest."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x) + kind[:, None], kind


class Layers(nn.Module):
    """Layers that take and give two tensors."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair(one) for one in layers)

    def pipeline_layers(self) -> list[nn.Module]:
        """In the order in which they run."""
        return list(self.layers)

    def forward(self, x: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x, kind = layer(x, kind)
        return x, kind


class Kinds(Chain):
    """Its layers hand on whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = Layers(self.net)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes."""
        found, kind = self.net(self.first(x), kind=(x[:, 0] > 0).long())
        return self.head(found) * (1 + kind[:, None])


class Joined(nn.Module):
    """A layer that takes one tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, kept = pair
        return self.layer(x) + kept, kept


class Tuples(Chain):
    """An nn.Sequential of layers that take one tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Joined(one) for one in self.net))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes."""
        x = self.first(x)
        return self.head(sum(self.net((x, x.sin()))))


class Shifted(nn.Module):
    """Changes its input in place, and does not say so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class InPlace(Chain):
    """Layers that change their inputs, at the beginning of every stage."""

    def __init__(self) -> None:
        super().__init__()
        pairs = (nn.Sequential(nn.ReLU(inplace=True), one[0]) for one in self.net)
        self.net = nn.Sequential(Shifted(), *pairs)


MODULES: dict[str, Any] = {one.__name__: one for one in (Explicit, InPlace, Kinds, Tuples)}


def _by_name(name: str, options: dict[str, Any]) -> Any:
    return by_pipeline(MODULES[name](), options, max_epochs=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in sorted(MODULES)),
        ("InPlace", {"activation_checkpointing": True, "split": [1, 3, 4]}),
    ],
)
def test_other_forms_of_modules_train_as_in_one_process(name: str, options: Any) -> None:
    expected = by_one(MODULES[name](), max_epochs=1)
    for weights, metrics in run_distributed(_by_name, args=(name, options)):
        assert distance(weights, expected.weights) < EXACT
        assert metrics == pytest.approx(expected.metrics, rel=1e-12)


# Distances after 8 steps; measured 1.5e-8, 6e-17, 1e-3 (one unit of its last place), and none.
PRECISIONS = {"32-true": 1e-6, "64-true": EXACT, "bf16-true": 2e-3, "bf16-mixed": 1e-6}


class Single(Chain):
    """In single precision, and tells in which its layers compute."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        found = self.net(self.first(x.to(self.dtype)))
        self.kind = found.dtype
        loss = F.cross_entropy(self.head(found), y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x.to(self.dtype)), y), sync_dist=True)


def _chosen(precision: str) -> dict[str, Any]:
    """Lightning takes ``precision="64-true"`` for no strategy of this kind, but its plugin."""
    if precision == "64-true":
        return {"plugins": [DoublePrecision()]}
    return {"precision": precision}


def _in_precision(precision: str) -> tuple[Any, Any]:
    module = Single()
    fit = by_pipeline(module, **_chosen(precision))
    return fit, getattr(module, "kind", None)  # the first rank does not come so far


@pytest.mark.parametrize(("precision", "bound"), PRECISIONS.items())
def test_precisions_are_those_of_one_process(precision: Any, bound: float) -> None:
    one = Single()
    expected = by_one(one, **_chosen(precision))
    found = run_distributed(_in_precision, args=(precision,))
    assert found[-1][1] == one.kind
    for (weights, metrics), _ in found:
        assert distance(weights, expected.weights) <= bound
        assert metrics["val_loss"] == pytest.approx(expected.metrics["val_loss"], rel=10 * bound)
