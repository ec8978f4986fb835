"""Precisions and dtypes under FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_distributed, trainer
from harness.fsdp2_parts import by_fsdp2, by_one
from harness.mixed_module import Mixed
from harness.strategy_cases import Weights, flat
from lightning.pytorch import Callback
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_ext.callbacks import WireMeter
from lightning_ext.strategies import FSDP2Strategy, ZeroPPStrategy

BF16 = torch.bfloat16


class Dtypes(Callback):
    """Keeps the dtypes of the first step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        trained = [p for p in module.parameters() if p.grad is not None]
        self.parameters = {p.dtype for p in trained}
        self.gradients = {p.grad.dtype for p in trained}


def dtypes(precision: Any, policy: MixedPrecisionPolicy | None) -> Any:
    seen = Dtypes()
    by_fsdp2(Mixed(), 1, how={"mp_policy": policy}, precision=precision, callbacks=[seen])
    return seen.parameters, seen.gradients


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-true", BF16),
        ("bf16-mixed", torch.float32),
    ],
)
def test_weights_and_gradients_have_the_dtype_of_the_precision(
    precision: str, dtype: torch.dtype
) -> None:
    assert run_distributed(dtypes, args=(precision, None)) == [({dtype}, {dtype})] * 2


def test_a_policy_of_torch_leaves_weights_and_gradients_in_float32() -> None:
    policy = MixedPrecisionPolicy(param_dtype=BF16)
    assert run_distributed(dtypes, args=("32-true", policy)) == [({torch.float32},) * 2] * 2


class Gathered(Callback):
    """Counts the bytes of gathers in the second batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.meter = WireMeter(ranks_per_node=1)
        self.meter.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.meter.__exit__(None, None, None)
        self.sent = self.meter.count.only(kind="all_gather").total.inter_bytes


def gathered(policy: MixedPrecisionPolicy | None) -> tuple[int, Weights]:
    seen = Gathered()
    how = {"mp_policy": policy}
    weights = by_fsdp2(Mixed(scalar=(1,)), 5, how=how, callbacks=[seen]).weights
    return seen.sent, weights


def test_a_policy_of_torch_gathers_and_computes_in_its_dtype() -> None:
    (full, _), _ = run_distributed(gathered, args=(None,))
    truth, start = flat(by_one(Mixed(), 5).weights), flat(dict(Mixed().named_parameters()))
    for sent, weights in run_distributed(gathered, args=(MixedPrecisionPolicy(param_dtype=BF16),)):
        assert 2 * sent == full
        assert (flat(weights) - truth).norm() <= 0.02 * (truth - start).norm()


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ZeroPPStrategy])
def test_float16_with_a_gradient_scaler_is_refused(strategy: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"16-mixed.*bf16-mixed"):
        strategy().precision_plugin = MixedPrecision(
            "16-mixed", "cpu", scaler=torch.GradScaler("cpu")
        )


def test_float64_is_refused_for_a_reason_of_its_own() -> None:
    with pytest.raises(MisconfigurationException, match=r"64-true.*ModelParallel.*double") as told:
        FSDP2Strategy().precision_plugin = DoublePrecision()
    assert "overflow" not in str(told.value)


@pytest.mark.filterwarnings("ignore:You passed .*precision='16-mixed'.* but AMP with fp16")
def test_plugins_are_checked_however_they_are_given() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="16-mixed"):
        trainer(strategy="fsdp2", plugins=[plugin])
    strategy: Any = FSDP2Strategy()
    with pytest.raises(MisconfigurationException, match="transformer-engine"):
        strategy.precision_plugin = Other()


class Other(MixedPrecision):
    """A precision that nobody knows here."""

    precision: Any = "transformer-engine"

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.precision = "transformer-engine"


class TwoDtypes(Mixed):
    """Its layers and what is outside of them are of two dtypes."""

    def __init__(self, inside: bool) -> None:
        super().__init__(scalar=(1,))
        for layer in self.layers:
            layer.up.double() if inside else layer.double()

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(1)
        for layer in self.layers:
            x = layer(x.double()).float()
        return self.head(x * self.frozen + self.shift) * self.scale


def two_dtypes(inside: bool) -> Any:
    seen = Dtypes()
    by_fsdp2(TwoDtypes(inside), 1, callbacks=[seen])
    return seen.gradients


def test_units_may_have_dtypes_of_their_own() -> None:
    assert run_distributed(two_dtypes, args=(False,)) == [{torch.float32, torch.float64}] * 2


def test_two_trained_dtypes_in_a_unit_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Layer are of .*float64.*`wrap`"):
        run_distributed(two_dtypes, args=(True,))


class Frozen(Mixed):
    """A layer is frozen, and in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.layers[0].requires_grad_(False)
        self.head.bias = nn.Parameter(torch.zeros(7, dtype=BF16), requires_grad=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words).mean(1)
        for layer in self.layers:
            x = layer(x)
        x = nn.functional.linear(x * self.frozen + self.shift, self.head.weight)
        return (x + self.head.bias) * self.scale


def frozen() -> Any:
    module = Frozen()
    weights = by_fsdp2(module, 3).weights
    return weights, {isinstance(one, DTensor) for one in module.layers[0].up.parameters()}


def test_a_frozen_part_is_sharded_too_and_stays() -> None:
    truth = by_one(Frozen(), 3).weights
    for found, sharded in run_distributed(frozen):
        assert sharded == {True}
        assert all(torch.allclose(found[n], x, rtol=0, atol=1e-12) for n, x in truth.items())
        assert torch.equal(found["layers.0.up.weight"], Mixed().layers[0].up.weight.double())
