"""Fits of a module with moments of few bits, by strategies of their names."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from harness._fits import trainer
from harness.low_bit_sharded import Weights, numbers_of, whole
from lightning_ext import optim
from lightning_ext.functional import QuantizedState
from lightning_ext.strategies import FSDP2Strategy, PipelineStrategy, ZeroPPStrategy

GLOBAL_BATCH = 16
WIDTH = 72  # 36 rows of a layer are no whole blocks
STRATEGIES: dict[str, Any] = {
    "one process": "auto",
    "ddp": DDPStrategy,
    "fsdp2": "fsdp2",
    "fsdp2 in a file": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
    "zeropp": "zeropp",
    "zeropp, exact": lambda: ZeroPPStrategy(
        quantize_weights=False, quantize_gradients=False, hpz=False
    ),
    "breadth_first_pipeline": lambda: PipelineStrategy("net", num_microbatches=4),
    "pipeline of shards": lambda: PipelineStrategy(
        "net", num_microbatches=4, data_parallel_size=2, save_distributed_checkpoint=True
    ),
    "pipeline_1f1b": lambda: PipelineStrategy("net", schedule="1f1b", num_microbatches=4),
}


class Wide(LightningModule):
    """Four layers in a row of more than 4096 entries each; batches go by the step alone.

    Args:
        format: of the moments.
        how: more settings of the optimizer.
    """

    def __init__(self, format: str = "int8", **how: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.first = nn.Linear(6, WIDTH)
            layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
            self.net = nn.Sequential(*layers)
            self.head = nn.Linear(WIDTH, 3)
        self.how: dict[str, Any] = {"lr": 1e-2, "state_dtype": format} | how
        self.start = {n: p.detach().clone() for n, p in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes."""
        out: Tensor = self.head(self.net(self.first(x)))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one whose moments may have few bits."""
        return optim.LowBitAdamW(self.parameters(), **self.how)


class OfSteps(DataLoader[Any]):
    """Batches that tell nothing of the place in an epoch; a run resumed in one sees the same."""

    def __init__(self, replicas: int, replica: int) -> None:
        draw = torch.Generator().manual_seed(1)
        x, y = torch.randn(GLOBAL_BATCH, 6, generator=draw), torch.arange(GLOBAL_BATCH) % 3
        own = TensorDataset(x[replica::replicas].repeat(8, 1), y[replica::replicas].repeat(8))
        super().__init__(own, GLOBAL_BATCH // replicas)


class Kept(Callback):
    """Whole weights, and this rank's moments, at the beginning of a fit and at its end."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.moments: list[Weights] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """As a checkpoint left them."""
        self._keep(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the strategy is taken down."""
        self._keep(trainer, module)

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        self.weights.append({n: whole(p) for n, p in module.named_parameters()})
        found: Weights = {}
        for name, param in module.named_parameters():
            for key, value in trainer.optimizers[0].state.get(param, {}).items():
                if isinstance(value, QuantizedState) or value.dim():
                    found[f"{name}.{key}"] = numbers_of(value)
        self.moments.append(found)


def fitted(
    strategy: str, module: LightningModule, steps: int, *more: Callback, **kwargs: Any
) -> Kept:
    """Fits on the ranks that there are, an epoch of eight steps after another.

    Args:
        strategy: of ``STRATEGIES``.
        module: such as ``Wide``.
        steps: of all epochs.
        more: callbacks.
        kwargs: of the Trainer, and ``ckpt_path``.
    """
    path, kept = kwargs.pop("ckpt_path", None), Kept()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    made = STRATEGIES[strategy]
    options: dict[str, Any] = {"strategy": made if isinstance(made, str) else made()}
    options |= {"devices": world, "use_distributed_sampler": False, "max_steps": steps}
    options |= {"max_epochs": -1, "accumulate_grad_batches": 1, "limit_val_batches": 0}
    run = trainer([kept, *more], **(options | kwargs))
    replicas = world
    if isinstance(run.strategy, PipelineStrategy):
        replicas = 2 if strategy == "pipeline of shards" else 1
    run.fit(module, OfSteps(replicas, rank * replicas // world), ckpt_path=path)
    return kept
