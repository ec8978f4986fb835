"""Weights of 8 bits under a Trainer: what trains them, and what is told of that which cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import Classifier, fit, loader
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ext.callbacks import (
    EMA,
    AdaptiveGradientClipping,
    GradientNoiseScale,
    NormLoss,
    SharpnessAware,
    WeightDistance,
)
from lightning_ext.nn import Int8Weight, convert_int8_linear
from lightning_ext.optim import LowBitAdamW, QGaLore, param_groups_for

REFUSED = r"^\w+ is not defined for an Int8Weight.*QGaLore.*undo_int8_linear"
Make = Callable[[nn.Module], Optimizer]


def _qgalore(module: nn.Module) -> Optimizer:
    return QGaLore(param_groups_for(module, QGaLore, head="net.4"), lr=0.01, rank=2)


class Int8Classifier(Classifier):
    """A classifier in codes, with a norm layer that has none."""

    def __init__(self, make: Make = _qgalore) -> None:
        super().__init__(dropout=0)
        self.net.insert(1, nn.LayerNorm(12))
        convert_int8_linear(self)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Optimizer:
        return self.make(self)


def _fit(callbacks: Sequence[Callback] = (), make: Make = _qgalore, **kwargs: Any) -> Any:
    data = loader(16, shuffle=False)
    return fit(callbacks, module=Int8Classifier(make), train=data, **kwargs)[0]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, LowBitAdamW])
def test_a_run_with_another_optimizer_ends_with_the_error_that_says_so(kind: Any) -> None:
    with pytest.raises(TypeError, match=REFUSED):
        _fit(make=lambda module: kind(module.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "callback",
    [
        EMA(),
        NormLoss(),
        AdaptiveGradientClipping(),
        SharpnessAware(),
        WeightDistance(every_n_steps=1),
        GradientNoiseScale(every_n_steps=1, source="per_sample"),
        GradientNoiseScale(every_n_steps=1, source="norm_layers"),
    ],
)
def test_a_callback_that_computes_with_weights_ends_it_with_that_error(callback: Callback) -> None:
    with pytest.raises(TypeError, match=REFUSED):
        _fit([callback])


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "micro_batches"},
        {"source": "consecutive_steps"},
        {"geometry": "l1"},
        {"geometry": "nuclear"},
        {"tests": ("inner_products", "coordinates", "gradient_snr")},
    ],
)
def test_the_noise_scale_of_micro_batches_is_measured(settings: dict[str, Any]) -> None:
    noise = GradientNoiseScale(every_n_steps=1, **settings)
    _fit([noise], accumulate_grad_batches=4, max_epochs=4)
    assert noise.estimate().grad_trace > 0


def test_callbacks_that_can_leave_weights_out_work_with_the_rest() -> None:
    _fit([NormLoss(exclude=["net.0.weight", "net.4.weight"])])
    _fit([AdaptiveGradientClipping(exclude=["net.0.weight", "net.4.weight"])])


class Bfloat16Module(LightningModule):
    """A model that is converted where it is made."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
        convert_int8_linear(self.net, exclude=["2"])
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        assert x.dtype == self.net[0].weight.dtype == torch.bfloat16
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Optimizer:
        groups = param_groups_for(self, QGaLore, head="net.2")
        return QGaLore(groups, lr=self.lr, rank=4)


def _fit_in_bfloat16(lr: float) -> tuple[Bfloat16Module, Tensor]:
    module = Bfloat16Module(lr)
    begun = module.net[0].weight.codes.clone()
    fit(module=module, train=loader(32, shuffle=False), max_epochs=8, precision="bf16-true")
    return module, begun


def test_a_module_trains_in_bfloat16() -> None:
    module, begun = _fit_in_bfloat16(lr=0.05)
    weight = module.net[0].weight
    assert isinstance(weight, Int8Weight)
    assert weight.scales.dtype == torch.float32
    assert not torch.equal(weight.codes, begun)
    assert sum(module.losses[-8:]) < 0.8 * sum(module.losses[:8])


def test_at_rate_0_codes_stay_in_bfloat16() -> None:
    module, begun = _fit_in_bfloat16(lr=0.0)
    assert torch.equal(module.net[0].weight.codes, begun)
