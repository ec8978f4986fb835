"""A plan against the peak of a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from examples.language_model.module import GPT
from lightning_ext import optim
from lightning_ext.callbacks import memory_held, memory_plan

pytestmark = pytest.mark.gpu
OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "came": optim.CAME}


def peak_of_a_step(module: nn.Module, run: Any, optimizer: torch.optim.Optimizer) -> int:
    """The most that is allocated in the second step, when gradients and states are there."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        run().backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_storages_are_those_planned_and_the_peak_of_a_step_is_above_them(name: str) -> None:
    before = torch.cuda.memory_allocated()
    module = GPT(width=384, layers=6).cuda()
    windows = torch.randint(256, (64, 65), dtype=torch.uint8, device="cuda")
    plan = memory_plan(module, optimizer=OPTIMIZERS[name], micro_batch=windows)
    assert torch.cuda.memory_allocated() - before <= 1.01 * plan.weights_bytes + 2**20
    real = OPTIMIZERS[name](module.parameters())
    peak = peak_of_a_step(module, lambda: module.loss(windows), real) - before
    held = memory_held(module, real)
    assert {key: getattr(plan, key) for key in held} == held
    # Temporary tensors come on top, and a part of them: gradients of activations.
    assert plan.total_bytes <= peak <= 1.5 * plan.total_bytes
