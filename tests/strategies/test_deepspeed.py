"""ZeRO-3 and hpZ by DeepSpeed on CPUs: the numbers of one process and of DDP, in float32."""

from __future__ import annotations

import os
import signal
from collections import Counter
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, identical, run_distributed
from harness.deepspeed_parts import KNOWN_WARNINGS, Weights, deepspeed, furthest, trained, warm_up
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_ext.optim import Lion

pytestmark = [*KNOWN_WARNINGS, pytest.mark.usefixtures("_warm")]
EPOCH = 24  # batches of one process


@pytest.fixture(scope="module")
def _warm() -> None:
    warm_up()


class Groups(Classifier):
    """Two parameter groups under Lion."""

    def configure_optimizers(self) -> Any:
        first = {"params": self.net[0].parameters(), "lr": 3e-3}
        return Lion([first, {"params": self.net[3].parameters()}], lr=1e-2, weight_decay=0.1)


class Odd(Classifier):
    """Tied, frozen and unused parameters, one smaller than the world, and one used now and then."""

    def __init__(self) -> None:
        super().__init__("unit", dropout=0.0)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))
        self.sometimes = nn.Parameter(torch.ones(3))
        self.one, self.same = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.same.weight = self.one.weight
        self.norm = nn.LayerNorm(12)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, x, y = batch
        hidden = self.norm(self.same(self.one(self.net[0](x)).relu()))
        out = self.net[3](hidden) * self.scale * self.frozen
        out = out * self.sometimes if batch_idx % 4 < 2 else out
        return nn.functional.cross_entropy(out, y)


class Manual(Classifier):
    """Steps by itself, after every third batch."""

    def __init__(self) -> None:
        super().__init__("unit", dropout=0.0)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if batch_idx % 3 == 0:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) / 3)
        if batch_idx % 3 == 2:
            optimizer.step()


def classifier(optimizer: str = "unit") -> Classifier:
    return Classifier(optimizer, dropout=0.0)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one step of 12 micro-batches": (classifier, {"accumulate_grad_batches": 12}),
    "accumulation": (classifier, {"accumulate_grad_batches": 4}),
    "a cut last window": (classifier, {"accumulate_grad_batches": 5, "max_epochs": 2}),
    "clipping": (classifier, {"gradient_clip_val": 0.1, "max_epochs": 2}),
    "50 steps of AdamW": (
        lambda: classifier("adamw"),
        {"accumulate_grad_batches": 1, "max_epochs": -1, "max_steps": 50},
    ),
    "two groups under Lion": (lambda: Groups(dropout=0.0), {"max_epochs": 2}),
    "manual optimization": (Manual, {"accumulate_grad_batches": 1}),
    "odd parameters": (Odd, {"accumulate_grad_batches": 2}),
}


def case(strategy: Any, name: str) -> Weights:
    make, options = CASES[name]
    return trained(strategy, 2, module=make(), **options)[0]


def all_cases() -> dict[str, tuple[Weights, Weights]]:
    """What DDP makes of each, and DeepSpeed."""
    odd = DDPStrategy(find_unused_parameters=True)
    return {
        name: (case(odd if name == "odd parameters" else "ddp", name), case("deepspeed", name))
        for name in CASES
    }


@cache
def found() -> list[dict[str, tuple[Weights, Weights]]]:
    return run_distributed(all_cases)


@pytest.mark.filterwarnings("ignore:You are using `LightningModule.manual_backward`")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_under_ddp(name: str) -> None:
    for rank in found():
        by_ddp, by_deepspeed = rank[name]
        assert furthest(by_deepspeed, by_ddp) <= 1e-6


def test_the_first_step_is_that_of_one_process() -> None:
    alone, _ = trained("auto", 1, module=classifier(), accumulate_grad_batches=EPOCH)
    begin = dict(classifier().state_dict())
    _, many = found()[0]["one step of 12 micro-batches"]
    expected = {name: alone[name] - begin[name] for name in begin}
    steps = {name: many[name] - begin[name] for name in begin}
    assert furthest(steps, expected) <= 1e-6


def gathered(size: int | None, ranks_per_node: Any) -> tuple[Weights, Counter[int]]:
    """Weights, and how many gathers there were of so many ranks."""
    sizes: Counter[int] = Counter()
    plain = dist.all_gather_into_tensor

    def counting(*args: Any, **kwargs: Any) -> Any:
        sizes[dist.get_world_size(kwargs["group"])] += 1
        return plain(*args, **kwargs)

    options = {"module": classifier(), "accumulate_grad_batches": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", counting)
        strategy = deepspeed(hpz_partition_size=size, ranks_per_node=ranks_per_node)
        return trained(strategy, 4, **options)[0], sizes


def test_hpz_gathers_inside_of_nodes_and_changes_no_bit() -> None:
    plain, by_four = run_distributed(gathered, 4, args=(None, "auto"))[0]
    hpz, by_two = run_distributed(gathered, 4, args=("auto", 2))[0]
    assert identical(hpz, plain)
    assert set(by_four) == {4}
    assert by_two[2] > 0
    assert by_two[4] < by_four[4]


class Kill(Callback):
    """Ends the process of rank 1 in its fourth batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: str) -> None:
    saver = ModelCheckpoint(folder, every_n_train_steps=1, filename="last", save_top_k=1)
    strategy = deepspeed(timeout=timedelta(seconds=10))
    options = {"accumulate_grad_batches": 1, "enable_checkpointing": True}
    trained(strategy, 2, callbacks=[saver, Kill()], **options)


def resumed(folder: str) -> int:
    path = next(str(path) for path in Path(folder).iterdir())
    return trained("deepspeed", 2, accumulate_grad_batches=1, ckpt_path=path)[1].global_step


@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before:UserWarning"
)
def test_a_rank_that_dies_ends_the_others_and_the_last_checkpoint_loads(tmp_path: Path) -> None:
    first, second = run_distributed(killed, args=(str(tmp_path),), return_exceptions=True)
    assert "lost the others in a collective" in str(getattr(first, "__notes__", first))
    assert "died with exit code -9" in str(second)
    assert run_distributed(resumed, args=(str(tmp_path),)) == [12, 12]
