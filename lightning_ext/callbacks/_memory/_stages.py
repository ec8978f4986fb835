"""What each rank of a pipeline holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn
from torch.nn import Parameter

from lightning_ext.callbacks._memory._activations import Saved
from lightning_ext.callbacks._memory._checks import require_counts
from lightning_ext.callbacks._memory._layouts import (
    SCHEDULES,
    Held,
    Ranks,
    States,
    gradient_bytes,
    weight_bytes,
)
from lightning_ext.callbacks._memory._parts import own_parameters
from lightning_ext.callbacks._memory._ranks import Split
from lightning_ext.scaling import MemoryPlan, balanced_split, pipeline_timeline


class Pipeline(NamedTuple):
    """How a pipeline is set.

    Attributes:
        ranks: Of one pipeline.
        stages_per_rank: Stages of each.
        num_microbatches: Of a batch.
        data_parallel: "fsdp2" or "ddp", between replicas.
    """

    ranks: int
    stages_per_rank: int
    num_microbatches: int
    data_parallel: str


def cut_layers(layers: Sequence[nn.Module], stages: int) -> list[list[nn.Module]]:
    """Cuts layers into stages of as many layers each, or one more.

    Args:
        layers: In order.
        stages: How many.
    """
    starts = balanced_split([1.0] * len(layers), stages)
    ends = [*starts[1:], len(layers)]
    return [list(layers[a:b]) for a, b in zip(starts, ends, strict=True)]


def pipeline_of(
    devices: int,
    ranks: Ranks,
    stages_per_rank: int | Literal["auto"],
    num_microbatches: int | Literal["auto"],
    data_parallel: str,
) -> Pipeline:
    """Settles what is "auto".

    Args:
        devices: All ranks.
        ranks: Of which ``size`` replicas are to be.
        stages_per_rank: As asked for.
        num_microbatches: As asked for.
        data_parallel: Between replicas.

    Raises:
        ValueError: They do not fit together.
    """
    if devices % ranks.size:
        raise ValueError(
            f"data_parallel_size={ranks.size} does not divide devices={devices}; the other factor"
            " is the ranks of a pipeline"
        )
    if data_parallel not in ("fsdp2", "ddp"):
        raise ValueError(f"data_parallel={data_parallel!r} is unknown; it must be 'fsdp2' or 'ddp'")
    if stages_per_rank == "auto":
        stages_per_rank = 1 if SCHEDULES[ranks.strategy] in ("gpipe", "1f1b") else 2
    require_counts(stages_per_rank=stages_per_rank)
    size = devices // ranks.size
    count = 2 * size * stages_per_rank if num_microbatches == "auto" else num_microbatches
    return Pipeline(size, stages_per_rank, count, data_parallel)


def held_by_stages(
    module: nn.Module,
    states: States,
    ranks: Ranks,
    pipeline: Pipeline,
    stages: Sequence[Sequence[nn.Module]],
    saved: Saved,
) -> list[tuple[Held, float]]:
    """Counts the bytes of each rank of a pipeline, and of its activations.

    Args:
        module: All of it.
        states: As in ``held_by_rank``.
        ranks: How states are divided between replicas.
        pipeline: How it is set.
        stages: Layers of each stage.
        saved: What a micro-batch leaves in each.
    """
    timeline = pipeline_timeline(
        SCHEDULES[ranks.strategy],
        pipeline_ranks=pipeline.ranks,
        stages_per_rank=pipeline.stages_per_rank,
        num_microbatches=pipeline.num_microbatches,
    )
    activations = MemoryPlan.in_flight(timeline, saved.stages)
    layers = {id(p) for p in own_parameters([x for stage in stages for x in stage])}
    outside = [p for p in module.parameters() if id(p) not in layers]
    is_cut = pipeline.data_parallel == "fsdp2" and ranks.size > 1
    split = Split(ranks.size, frozenset(layers)) if is_cut else None
    bytes_of = states(split, None)
    found = []
    for rank in range(pipeline.ranks):
        own = [own_parameters(stage) for stage in stages[rank :: pipeline.ranks]]
        held = _held(own, outside, ranks, split)
        kept = {id(p) for p in (*outside, *(p for stage in own for p in stage))}
        found.append(
            (held._replace(states_bytes=sum(bytes_of.get(k, 0) for k in kept)), activations[rank])
        )
    return found


def _held(
    own: Sequence[Sequence[Parameter]],
    outside: Sequence[Parameter],
    ranks: Ranks,
    split: Split | None,
) -> Held:
    """What a rank holds without states.

    Args:
        own: Parameters of each of its stages.
        outside: Those that all ranks have.
        ranks: How they are divided between replicas.
        split: Of these; ``None`` where each replica has all.
    """
    inside = list(dict.fromkeys(p for stage in own for p in stage))
    whole = [*outside, *inside]
    if split is None:
        buckets = gradient_bytes(inside) if ranks.size > 1 else 0
        return Held(weight_bytes(whole), gradient_bytes(whole), 0.0, copies_bytes=buckets)
    breadth_first = ranks.strategy == "breadth_first_pipeline" and ranks.accumulate == 1
    gathered = MemoryPlan.gathered_stages(
        [weight_bytes(stage) for stage in own],
        [gradient_bytes(stage) for stage in own],
        breadth_first=breadth_first,
    )
    gradients = gradient_bytes(whole, split.shape_of if breadth_first else None)
    return Held(weight_bytes(whole, split.shape_of), gradients, 0.0, gathered)
