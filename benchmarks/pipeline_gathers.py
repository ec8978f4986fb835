r"""How often the stages of a pipeline are gathered and reduced in one batch, counted on the wire.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone \
        --nproc-per-node 4 benchmarks/pipeline_gathers.py  # a minute

Two pipeline ranks by two replicas, whose stages FSDP2 shards and keeps gathered between passes. Of
each schedule the last of three batches on the first rank, beside `scaling.pipeline_timeline` (the
order in which torch's runtime gathers, with up to three stages at a time) and
`scaling.paper_gathers` (one stage at a time; Lamy-Poirier 2023, arXiv:2211.05953).
"""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._rows import ROOT, describe, write
from lightning_ext.callbacks import WireMeter
from lightning_ext.scaling import paper_gathers, pipeline_timeline
from lightning_ext.strategies import PipelineStrategy

RESULTS = ROOT / "benchmarks" / "results" / "pipeline_gathers.csv"
RANKS, REPLICAS, MICRO_BATCHES, BATCHES = 2, 2, 8, 3
LAYOUTS = [
    ("gpipe", 1),
    ("1f1b", 1),
    *((schedule, n) for schedule in ("breadth_first", "interleaved_1f1b") for n in (1, 2, 4, 8)),
]


class Count(NamedTuple):
    """Collectives of one rank among its replicas."""

    gathers: int
    reduces: int


class Chain(LightningModule):
    """As many layers as there are stages."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean square of what comes out."""
        return F.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(Callback):
    """Counts each batch of this rank."""

    def __init__(self) -> None:
        self.found: list[Count] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Looks at what is sent from now on."""
        self.meter = WireMeter(ranks_per_node=1)
        self.meter.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        """Keeps what replicas have sent to each other; all ranks together are another group."""
        self.meter.__exit__(None, None, None)
        seen = self.meter.count
        gathers, reduces = (
            seen.only(kind=kind, group_size=REPLICAS).calls
            for kind in ("all_gather", "reduce_scatter")
        )
        self.found.append(Count(gathers, reduces))


def counts(schedule: str, stages_per_rank: int, accumulate: int = 1) -> list[Count]:
    """Fits a module with one layer in each stage; all ranks must call.

    Args:
        schedule: Of the pipeline.
        stages_per_rank: Stages of each rank.
        accumulate: Batches of an optimizer step.

    Returns:
        Of each batch.
    """
    strategy: Any = PipelineStrategy(
        "net",
        schedule=schedule,  # type: ignore[arg-type]  # names of a table
        stages_per_rank=stages_per_rank,
        num_microbatches=MICRO_BATCHES,
        data_parallel_size=REPLICAS,
    )
    seen = Counts()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        callbacks=[seen],
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    samples = TensorDataset(torch.ones(BATCHES * MICRO_BATCHES, 4))
    trainer.fit(Chain(RANKS * stages_per_rank), DataLoader(samples, MICRO_BATCHES))
    return seen.found


def row(schedule: str, stages_per_rank: int) -> dict[str, str]:
    """The counts of one layout, beside those on paper."""
    numbers = {
        "pipeline_ranks": RANKS,
        "stages_per_rank": stages_per_rank,
        "num_microbatches": MICRO_BATCHES,
    }
    first, *_, last = counts(schedule, stages_per_rank)
    modelled = pipeline_timeline(schedule, **numbers, data_parallel="fsdp2")
    found = {
        "gathers": last.gathers,
        "gathers_first_batch": first.gathers,
        "reduces": last.reduces,
        "gathers_timeline": modelled.gathers[0],
        "reduces_timeline": modelled.reduces[0],
        "gathers_paper": paper_gathers(schedule, **numbers),
    }
    shape = f"{RANKS} ranks x {stages_per_rank} stages, {MICRO_BATCHES} micro-batches"
    key = {
        "thing": "gathers of a batch",
        "variant": schedule,
        "mode": f"fsdp2, {REPLICAS} replicas",
    }
    key |= {"dtype": "float32", "shape": shape, "device": "any"}
    return key | {name: str(value) for name, value in (numbers | found).items()} | describe()


def main() -> None:
    """Counts every layout, and writes the rows on the first rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [row(*layout) for layout in LAYOUTS]
    if os.environ["RANK"] == "0":
        write(rows, RESULTS)
        for each in rows:
            print(*(each[name] for name in list(each)[1:-4]))


if __name__ == "__main__":
    main()
