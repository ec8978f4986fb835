"""The timeline of one batch through a pipeline, without devices.

Source: Lamy-Poirier 2023 (arXiv:2211.05953); torch.distributed.pipelining 2.11 to 2.13 for orders
    and gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_ext.scaling._pipeline._gathers import GATHER, REDUCE, paper_gathers, with_gathers
from lightning_ext.scaling._pipeline._orders import Work, rank_order, require_schedule
from lightning_ext.scaling._pipeline._render import draw_rows, draw_timeline, timeline_text
from lightning_ext.scaling._pipeline._timing import Costs, PipelineAction, time_actions
from lightning_ext.scaling._validate import require_count, require_non_negative

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_DATA_PARALLEL = (None, "ddp", "fsdp2")


@dataclass(frozen=True)
class PipelineTimeline:
    """One batch through a pipeline.

    Args:
        schedule: "breadth_first", "gpipe", "1f1b" or "interleaved_1f1b".
        pipeline_ranks: P.
        stages_per_rank: N_loop; stage s is on rank s mod P.
        num_microbatches: micro-batches of the batch.
        actions: of rank 0, then of rank 1, …, each in the order in which the rank starts them.
    """

    schedule: str
    pipeline_ranks: int
    stages_per_rank: int
    num_microbatches: int
    actions: tuple[PipelineAction, ...]

    @property
    def total_ms(self) -> float:
        """The end of the last action, in milliseconds."""
        return max(action.end_ms for action in self.actions)

    @property
    def idle_ms(self) -> tuple[float, ...]:
        """Milliseconds that each rank does not compute."""
        return tuple(
            self.total_ms - sum(a.end_ms - a.start_ms for a in self.of_rank(rank, is_pass=True))
            for rank in range(self.pipeline_ranks)
        )

    @property
    def bubble_fraction(self) -> float:
        """Idle over total, the mean of all ranks, with what is waited for sends and gathers."""
        total = self.total_ms * self.pipeline_ranks
        return sum(self.idle_ms) / total if total else 0.0

    @property
    def peak_stashed(self) -> tuple[int, ...]:
        """Of each rank, the most (stage, micro-batch) that are forward and not yet backward."""
        return tuple(_peak(self.of_rank(rank, is_pass=True)) for rank in range(self.pipeline_ranks))

    @property
    def gathers(self) -> tuple[int, ...]:
        """Stages gathered by each rank, by the rule of torch's runtime."""
        return self._count(GATHER)

    @property
    def reduces(self) -> tuple[int, ...]:
        """Stages whose gradients each rank reduces over data-parallel ranks."""
        return self._count(REDUCE)

    @property
    def paper_gathers(self) -> int:
        """Gathers of a rank that holds one gathered stage at a time, see `paper_gathers`."""
        return paper_gathers(
            self.schedule,
            pipeline_ranks=self.pipeline_ranks,
            stages_per_rank=self.stages_per_rank,
            num_microbatches=self.num_microbatches,
        )

    def of_rank(self, rank: int, *, is_pass: bool) -> list[PipelineAction]:
        """Return the forward and backward passes of a rank, or else its gathers and reductions."""
        return [
            a for a in self.actions if a.rank == rank and (a.micro_batch is not None) is is_pass
        ]

    def text(self, slot_ms: float | None = None) -> str:
        """Return one line for each rank: "A3" forward, "a3" backward, "--" goes on, "." idle.

        The letter is the local stage, A the first of the rank; the number is the micro-batch.

        Args:
            slot_ms: milliseconds of a slot; ``None``: the shortest pass.

        Returns:
            The lines; a slot shows what is computed in its middle.

        Raises:
            TypeError: if ``slot_ms`` is not a number.
            ValueError: if it is not above 0, or there would be more than 10,000 slots.
        """
        return timeline_text(self, slot_ms)

    def figure(self, path: str | Path | None = None) -> Figure:
        """Return a figure with a row for each rank, and save it where a path is given.

        Args:
            path: of a PNG or what else matplotlib writes.

        Returns:
            The figure. Colours are local stages, pale forward and full backward; white is idle;
            strips below a row are gathers and reductions.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return draw_timeline(self, path)

    def draw(self, axes: Axes) -> list[Patch]:
        """Draw the same on axes of a figure of yours, and return the handles of a legend."""
        return draw_rows(axes, self)

    def _count(self, kind: str) -> tuple[int, ...]:
        return tuple(
            sum(a.kind == kind for a in self.of_rank(rank, is_pass=False))
            for rank in range(self.pipeline_ranks)
        )


def pipeline_timeline(
    schedule: str,
    *,
    pipeline_ranks: int,
    stages_per_rank: int = 1,
    num_microbatches: int,
    forward_ms: float | Sequence[float] = 1.0,
    backward_ms: float | Sequence[float] = 2.0,
    send_ms: float = 0.0,
    gather_ms: float = 0.0,
    reduce_ms: float = 0.0,
    data_parallel: str | None = None,
    max_active_stages: int = 3,
) -> PipelineTimeline:
    """Return when each rank of a pipeline does what in one batch.

    Ranks compute in the order of torch's schedules. A pass starts when its rank is free, its input
    has arrived and its stage is gathered. Sends overlap with everything; gathers and reductions of
    a rank run one after the other beside its passes.

    Layered gradient accumulation (Lamy-Poirier 2021, arXiv:2106.02679) is "breadth_first" on one
    pipeline rank, its modular pipeline "breadth_first" with one layer in each stage.

    Args:
        schedule: "breadth_first", "gpipe", "1f1b" or "interleaved_1f1b".
        pipeline_ranks: P, at least 1.
        stages_per_rank: N_loop; 1 for "gpipe" and "1f1b". Stage s is on rank s mod P.
        num_microbatches: micro-batches of the batch; at least P for "1f1b", and in groups of at
            least P for "interleaved_1f1b".
        forward_ms: of a stage and micro-batch, or one number for each of the P·N_loop stages.
        backward_ms: the same.
        send_ms: until the output of a stage is on the next rank, and a gradient on the one before.
        gather_ms: to gather a stage; with "fsdp2".
        reduce_ms: to reduce the gradients of a stage; with "ddp" and "fsdp2".
        data_parallel: ``None``, nothing is gathered or reduced; "ddp", each stage is reduced after
            its last backward pass; "fsdp2", stages are gathered, too, as torch's runtime does.
        max_active_stages: that a rank keeps gathered, or gathers ahead; torch has 3.

    Returns:
        The timeline.

    Raises:
        TypeError: if a number is not one.
        ValueError: if a number is out of range, a name unknown, or torch does not have the schedule
            for these numbers.

    Example:
        >>> found = pipeline_timeline("gpipe", pipeline_ranks=2, num_microbatches=2)
        >>> print(found.text())
        rank 0  A0 A1 .  .  .  a0 -- a1 --
        rank 1  .  A0 A1 a0 -- a1 -- .  .
        >>> found.total_ms, found.bubble_fraction, found.peak_stashed
        (9.0, 0.3333333333333333, (2, 2))
    """
    require_schedule(schedule, pipeline_ranks, stages_per_rank, num_microbatches)
    require_count("max_active_stages", max_active_stages)
    if data_parallel not in _DATA_PARALLEL:
        raise ValueError(
            f"data_parallel={data_parallel!r} is unknown; it must be None, 'ddp' or 'fsdp2'"
        )
    for name, value in {"send_ms": send_ms, "gather_ms": gather_ms, "reduce_ms": reduce_ms}.items():
        require_non_negative(name, value)
    stages = pipeline_ranks * stages_per_rank
    costs = Costs(
        _of_stages("forward_ms", forward_ms, stages),
        _of_stages("backward_ms", backward_ms, stages),
        send_ms,
        gather_ms,
        reduce_ms,
    )
    lists = [
        _listed(
            rank_order(schedule, rank, pipeline_ranks, stages_per_rank, num_microbatches),
            data_parallel,
            max_active_stages,
        )
        for rank in range(pipeline_ranks)
    ]
    actions = tuple(time_actions(lists, costs))
    return PipelineTimeline(schedule, pipeline_ranks, stages_per_rank, num_microbatches, actions)


def _listed(
    order: list[Work], data_parallel: str | None, max_active_stages: int
) -> list[tuple[int, Work | str]]:
    """The order of a rank with the gathers and reductions that its data parallelism makes."""
    wanted = {None: (), "ddp": (REDUCE,), "fsdp2": (GATHER, REDUCE)}[data_parallel]
    lowered = with_gathers(order, max_active_stages)
    return [(s, work) for s, work in lowered if not isinstance(work, str) or work in wanted]


def _of_stages(name: str, value: float | Sequence[float], stages: int) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        require_non_negative(name, value)
        return [value] * stages
    values = list(value)
    if len(values) != stages:
        raise ValueError(
            f"{name} has {len(values)} numbers for {stages} stages; give one for each, or one "
            "number for all"
        )
    for index, each in enumerate(values):
        require_non_negative(f"{name}[{index}]", each)
    return values


def _peak(passes: list[PipelineAction]) -> int:
    """The most that are stashed; a rank starts its passes in this order."""
    stashed = highest = 0
    for kind, run in groupby(passes, key=lambda action: action.kind):
        stashed += sum(1 for _ in run) * (1 if kind == "forward" else -1)
        highest = max(highest, stashed)
    return highest
