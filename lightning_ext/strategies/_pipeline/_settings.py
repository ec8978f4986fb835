"""What a pipeline is asked to be."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ext.strategies._pipeline._data_parallel import DataParallel
from lightning_ext.strategies._pipeline._engine import ScheduleName
from lightning_ext.strategies._pipeline._split import Split

SINGLE = ("gpipe", "1f1b")  # schedules of one stage on each rank
ANY_NUMBER = ("breadth_first", "gpipe")  # those that take any number of micro-batches


class Settings(NamedTuple):
    """Arguments of :class:`PipelineStrategy`, of the same names."""

    module: str | None
    schedule: ScheduleName
    stages_per_rank: int | Literal["layers", "auto"]
    num_microbatches: int | Literal["auto"]
    num_eval_microbatches: int
    split: Split
    data_parallel: DataParallel
    data_parallel_size: int
    activation_checkpointing: bool
    mp_policy: MixedPrecisionPolicy

    def num_stages(self, ranks: int, layers: int) -> int:
        """Stages of all ranks.

        Args:
            ranks: Of a pipeline.
            layers: Of the split submodule.
        """
        if self.stages_per_rank == "layers":
            return layers
        if self.stages_per_rank == "auto":
            return ranks if self.schedule in SINGLE else 2 * ranks
        return ranks * self.stages_per_rank
