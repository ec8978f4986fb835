r"""The idle time of two ranks of a pipeline whose layers sleep, beside the simulator's.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone \
        --nproc-per-node 2 benchmarks/pipeline_bubble.py  # four minutes

Four layers sleep in each forward and backward pass, so that two ranks idle as if each had a device
of its own. Of a batch, from the first pass on any rank to the last, `bubble_fraction` is the part
that ranks do not sleep; the row is the fastest of eight batches. Beside it is that of
`scaling.pipeline_timeline`.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._rows import ROOT, describe, name_of, write
from lightning_ext.scaling import PipelineTimeline, pipeline_timeline
from lightning_ext.strategies import PipelineStrategy

RESULTS = ROOT / "benchmarks" / "results" / "pipeline_bubble.csv"
RANKS, LAYERS, MICRO_BATCHES, BATCHES = 2, 4, 4, 9  # the first batch is not counted
FORWARD_MS, BACKWARD_MS = 200.0, 400.0
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "breadth_first": 2}
Pass = tuple[float, float]  # seconds of a clock that all processes share


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer) -> Tensor:
        ctx.layer = layer
        layer.sleep(layer.forward_ms)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.layer.sleep(ctx.layer.backward_ms)
        return gradients[0], None


class Layer(nn.Module):
    """A linear layer that takes its time, and writes it down.

    Args:
        forward_ms: Of a forward pass.
        backward_ms: Of a backward pass.
    """

    def __init__(self, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.forward_ms, self.backward_ms = forward_ms, backward_ms
        self.passes: list[Pass] = []

    def forward(self, x: Tensor) -> Tensor:
        """Maps (samples, 4) to the same."""
        found: Tensor = _Sleep.apply(self.linear(x), self)
        return found

    def sleep(self, milliseconds: float) -> None:
        """Sleeps."""
        start = time.monotonic()
        time.sleep(milliseconds / 1000)
        self.passes.append((start, time.monotonic()))


class Sleepers(LightningModule):
    """Layers in a row."""

    def __init__(self, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Layer(forward_ms, backward_ms) for _ in range(LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean square of what comes out."""
        return F.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Idle(NamedTuple):
    """Of a batch on all ranks.

    Args:
        total_ms: From the start of the first pass to the end of the last.
        bubble_fraction: The part of it that ranks idle.
    """

    total_ms: float
    bubble_fraction: float


class Clock(Callback):
    """Measures each batch but the first."""

    def __init__(self) -> None:
        self.found: list[Idle] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        """Forgets what was before."""
        for layer in layers_of(module):
            layer.passes.clear()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Puts all ranks together."""
        ranks: list[list[Pass]] = [[] for _ in range(RANKS)]
        dist.all_gather_object(ranks, [one for layer in layers_of(module) for one in layer.passes])
        if index:
            self.found.append(idle(ranks))


def layers_of(module: nn.Module) -> list[Layer]:
    """Those that sleep."""
    return [layer for layer in module.modules() if isinstance(layer, Layer)]


def idle(ranks: list[list[Pass]]) -> Idle:
    """What passes of all ranks come to."""
    passes = [one for rank in ranks for one in rank]
    total = max(end for _, end in passes) - min(start for start, _ in passes)
    busy = sum(end - start for start, end in passes)
    return Idle(1000 * total, 1 - busy / (total * len(ranks)))


def measured(
    schedule: str, micro_batches: int, batches: int, forward_ms: float, backward_ms: float
) -> Idle:
    """The fastest batch; both ranks must call.

    Args:
        schedule: A key of `SCHEDULES`.
        micro_batches: Of a batch.
        batches: The first is not counted.
        forward_ms: Of a layer.
        backward_ms: Of a layer.
    """
    strategy: Any = PipelineStrategy(
        "net",
        schedule=schedule,  # type: ignore[arg-type]  # names of a table
        stages_per_rank=SCHEDULES[schedule],
        num_microbatches=micro_batches,
    )
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        callbacks=[clock],
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    samples = TensorDataset(torch.ones(batches * micro_batches, 4))
    trainer.fit(Sleepers(forward_ms, backward_ms), DataLoader(samples, micro_batches))
    return min(clock.found)


def modelled(
    schedule: str, micro_batches: int, forward_ms: float, backward_ms: float
) -> PipelineTimeline:
    """The same on paper, see `measured`."""
    loops = SCHEDULES[schedule]
    layers = LAYERS // (RANKS * loops)
    return pipeline_timeline(
        schedule,
        pipeline_ranks=RANKS,
        stages_per_rank=loops,
        num_microbatches=micro_batches,
        forward_ms=layers * forward_ms,
        backward_ms=layers * backward_ms,
    )


def row(schedule: str, micro_batches: int) -> dict[str, str]:
    """One schedule, measured and modelled."""
    found = measured(schedule, micro_batches, BATCHES, FORWARD_MS, BACKWARD_MS)
    paper = modelled(schedule, micro_batches, FORWARD_MS, BACKWARD_MS)
    loops = SCHEDULES[schedule]
    key = {"thing": "bubble", "variant": schedule, "mode": f"{LAYERS} layers, 200 + 400 ms each"}
    shape = f"{RANKS} ranks x {loops} stages, {micro_batches} micro-batches"
    key |= {"dtype": "float32", "shape": shape, "device": name_of("cpu")}
    figures = {
        "total_ms": f"{found.total_ms:.1f}",
        "total_ms_timeline": f"{paper.total_ms:.1f}",
        "bubble_fraction": f"{found.bubble_fraction:.4f}",
        "bubble_fraction_timeline": f"{paper.bubble_fraction:.4f}",
    }
    return key | figures | describe()


def main() -> None:
    """Measures every schedule, and writes the rows on the first rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [row(schedule, MICRO_BATCHES) for schedule in SCHEDULES]
    if os.environ["RANK"] == "0":
        write(rows, RESULTS)
        for each in rows:
            print(*(each[name] for name in list(each)[1:-4]))


if __name__ == "__main__":
    main()
