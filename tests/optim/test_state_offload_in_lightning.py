"""OffloadedStates in a Trainer, on the CPU, and by itself on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.offload_cases import BASES, Run, adamw, same
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from lightning_ext import optim
from lightning_ext.functional import QuantizedState
from lightning_ext.optim import OffloadedStates

WHOLE = 2**40
sizes = pytest.mark.parametrize("chunk_bytes", [1, 45_000, WHOLE])
every_base = pytest.mark.parametrize("base", BASES)


class Module(LightningModule):
    """Accumulates, clips and schedules."""

    def __init__(self, chunk_bytes: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 72), nn.Linear(72, 1))
        self.chunk_bytes = chunk_bytes

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        base: Optimizer = optim.LowBitAdamW(self.parameters(), lr=0.01)
        if self.chunk_bytes is not None:
            base = OffloadedStates(base, chunk_bytes=self.chunk_bytes)
        schedule = ExponentialLR(base, 0.9)
        return {
            "optimizer": base,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def fit(module: Module, folder: Path, steps: int, ckpt_path: Path | None = None) -> Trainer:
    torch.manual_seed(1)
    data = torch.randn(12, 4, 8)  # batches
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        strategy=SingleDeviceStrategy("cpu"),
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def equal_weights(one: Module, other: Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_lightning_module_trains_as_with_the_base(tmp_path: Path) -> None:
    plain, run = Module(None), Module(1)
    fit(plain, tmp_path, 12)
    fit(run, tmp_path, 12)
    assert equal_weights(plain, run)


def test_a_lightning_checkpoint_of_either_is_for_both(tmp_path: Path) -> None:
    truth = Module(None)
    fit(Module(None), tmp_path, 6).save_checkpoint(tmp_path / "plain.ckpt")
    fit(Module(WHOLE), tmp_path, 6).save_checkpoint(tmp_path / "offloaded.ckpt")
    fit(truth, tmp_path, 12, tmp_path / "plain.ckpt")
    for chunk_bytes, name in ((10_000, "plain"), (1, "offloaded"), (None, "offloaded")):
        resumed = Module(chunk_bytes)
        fit(resumed, tmp_path, 12, tmp_path / f"{name}.ckpt")
        assert equal_weights(truth, resumed)


def on_device(state: dict[str, Any]) -> list[Tensor]:
    tensors = [x for y in state.values() for x in (y[:2] if isinstance(y, QuantizedState) else [y])]
    return [x for x in tensors if x.dim() and x.numel() and not x.is_cpu]


@pytest.mark.gpu
@sizes
@every_base
def test_on_a_device_it_is_the_base_to_the_bit(base: str, chunk_bytes: int) -> None:
    plain = Run(BASES[base], device="cuda").steps(9)
    run = Run(BASES[base], chunk_bytes, device="cuda").steps(9)
    assert same(run, plain)
    states = run.optimizer.state
    assert not [x for p in run.params for x in on_device(dict(states.get(p, {})))]


@pytest.mark.gpu
def test_what_is_loaded_on_a_device_stays_on_the_host() -> None:
    first = Run(adamw, 45_000, device="cuda").steps(4)
    second = Run(adamw, 45_000, device="cuda")
    second.optimizer.load_state_dict(first.saved())
    for mine, other in zip(second.params, first.params, strict=True):
        mine.data.copy_(other.data)
    for state in second.optimizer.state.values():
        for name, value in state.items():
            state[name] = value.cuda()  # as Lightning does
        assert not on_device(dict(state))
    second.taken = 4
    assert same(first.steps(3), second.steps(3))


@pytest.mark.gpu
def test_the_device_holds_two_chunks_and_no_more() -> None:
    params = [Parameter(torch.zeros(2**20, device="cuda")) for _ in range(32)]
    optimizer = OffloadedStates(torch.optim.AdamW(params), chunk_bytes=2**24)
    for p in params:
        p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 2 * 2**24 + 2**20
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    # Two chunks, and what foreach keeps of one chunk's parameters between two operations.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 2**24 + 2 * 2**24
