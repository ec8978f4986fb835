"""SharpnessAware on several ranks: the perturbation is that of the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Classifier, dataset, fit, fsdp2, fsdp2_strategy, run_distributed, shard
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, SequentialSampler

from lightning_ext._lightning import holds_unreduced
from lightning_ext.callbacks import AdaptiveBatchSize, LocalGradients, SharpnessAware
from lightning_ext.data import AdaptiveBatchSampler
from lightning_ext.optim import DistributedLion


class Sharded(Classifier):
    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            shard(self.net, self.device_mesh)


class ScaledFloat64(MixedPrecision):
    """A gradient scaler without the rounding of half precision."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


class CountsInABuffer(Classifier):
    """DDP sends it from rank 0 with each forward pass."""

    def __init__(self) -> None:
        super().__init__("sgd", 0.0)
        self.register_buffer("seen_steps", torch.zeros(1))
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen_steps += 1
        return super().training_step(batch, batch_idx)


def run(kind: str, module: str, adaptive: bool, accumulate: int, clip: float | None) -> Any:
    data = dataset(90, torch.float64)  # the last step of an epoch is smaller
    sampler = AdaptiveBatchSampler(SequentialSampler(data), 4)
    settings: dict[str, Any] = {
        "one": {},
        "ddp": {"strategy": "ddp", "devices": 2},
        "views": {"strategy": DDPStrategy(gradient_as_bucket_view=True), "devices": 2},
        "scaled": {"strategy": "ddp", "devices": 2, "plugins": [ScaledFloat64()]},
        "fsdp2": fsdp2(2) if kind == "fsdp2" else {},
    }[kind]
    made = {"plain": Classifier, "buffers": CountsInABuffer, "sharded": Sharded}[module]
    net = made() if module == "buffers" else made("sgd", 0.0).double()
    callback = SharpnessAware(0.1, adaptive=adaptive)
    trained, trainer = fit(
        [AdaptiveBatchSize("0:16"), callback],
        module=net,
        train=DataLoader(data, batch_sampler=sampler),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        **settings,
    )
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trained.parameters()]
    weights = torch.cat([p.detach().flatten() for p in whole])
    buffers = torch.cat([b.flatten() for b in trained.buffers()]) if module == "buffers" else None
    return weights, trainer.callback_metrics["sharpness"].item(), callback.steps, buffers


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("kind", "module"),
    [("ddp", "plain"), ("views", "plain"), ("scaled", "plain"), ("fsdp2", "sharded")],
)
def test_two_processes_are_one(kind: str, module: str, adaptive: bool) -> None:
    weights, sharpness, steps, _ = run("one", "plain", adaptive, 4, 1.0)
    for found in run_distributed(run, args=(kind, module, adaptive, 2, 1.0)):
        torch.testing.assert_close(found[0], weights, rtol=0, atol=1e-12)
        assert found[1] == pytest.approx(sharpness, abs=1e-6)  # logged in float32
        assert found[2] == steps == 12


def test_buffers_that_ddp_sends_are_those_of_the_first_pass() -> None:
    for found in run_distributed(run, args=("ddp", "buffers", False, 2, None)):
        assert found[3].item() == 24


REDUCED: list[bool] = []


class Notes(Classifier):
    """Whether the gradients of a batch will be reduced, or others wait for it to be."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        wrapper = self.trainer.strategy.model
        ddp = isinstance(wrapper, DistributedDataParallel)
        REDUCED.append(wrapper.require_backward_grad_sync if ddp else holds_unreduced(self))
        return super().training_step(batch, batch_idx)


def reductions(kind: str) -> list[bool]:
    settings = fsdp2_strategy(2) if kind == "ours" else {"strategy": "ddp", "devices": 2}
    fit([SharpnessAware(0.1)], module=Notes(), max_steps=2, **settings)
    return REDUCED


@pytest.mark.parametrize("kind", ["ddp", "ours"])
def test_gradients_are_reduced_once_in_each_pass(kind: str) -> None:
    for found in run_distributed(reductions, args=(kind,)):
        assert found == [False, True] * 4  # two micro-batches, two passes, two steps


def with_local_gradients() -> str:
    with pytest.raises(MisconfigurationException) as caught:
        fit([SharpnessAware(0.1), LocalGradients()], module=Own(), strategy="ddp", devices=2)
    return str(caught.value)


class Own(Classifier):
    def configure_optimizers(self) -> Any:
        return DistributedLion(self.parameters())


def test_gradients_that_stay_local_are_refused() -> None:
    for text in run_distributed(with_local_gradients):
        assert "the gradient that ranks have in common" in text
