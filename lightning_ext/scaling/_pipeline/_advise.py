"""Which layout of pipeline and data-parallel ranks reaches a target first, on paper.

Source: Lamy-Poirier 2021 (arXiv:2106.02679), the least time under a critical batch, and 2023
    (arXiv:2211.05953); McCandlish et al. 2018 (arXiv:1812.06162), steps against batch; rules of
    Huang et al. 2019 (GPipe, arXiv:1811.06965), Dash et al. 2023 (arXiv:2312.12705) and Hagemann
    et al. 2023 (arXiv:2311.05610).
Differs: all layouts are gone through; the rules only comment on them. There is no tensor
    parallelism, so that a batch has at least one sample for each rank of a full pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_ext.scaling._noise import batch_efficiency
from lightning_ext.scaling._pipeline._bubble import bubble_fraction
from lightning_ext.scaling._pipeline._layout import (
    GATHERS,
    Candidate,
    PipelineCluster,
    PipelineModel,
    memory_bytes,
    step_seconds,
)
from lightning_ext.scaling._pipeline._rules import layout_notes
from lightning_ext.scaling._pipeline._seconds import DATA_PARALLEL, LAYOUT_SCHEDULES, Shape
from lightning_ext.scaling._validate import require_count, require_positive

_STRATEGIES = ("ddp", "fsdp2")
_TURNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Beyond 16 times the critical batch, steps come within 6 % of the fewest.
_LARGEST_BATCH = 16


@dataclass(frozen=True)
class PipelinePlan:
    """A layout, and what it costs by the model.

    Args:
        schedule: "breadth_first", "gpipe", "1f1b", "interleaved_1f1b", or "data_parallel", without
            a pipeline, micro-batch after micro-batch. "breadth_first" on one pipeline rank is
            layered gradient accumulation.
        data_parallel: "ddp" or "fsdp2".
        pipeline_ranks: P.
        stages_per_rank: N_loop.
        data_parallel_size: replicas of the pipeline.
        micro_batch: samples of a pass.
        num_microbatches: micro-batches of each replica and step.
        recompute: whether layers are computed again in the backward pass.
        step_s: seconds of a step.
        compute_s: those of computing alone, without recomputation, overhead and uneven stages.
        target_s: seconds to the target.
        memory_bytes: of the rank that needs most.
        sent_bytes: what a rank sends in a step.
        notes: rules of the literature that the layout does not follow.
    """

    schedule: str
    data_parallel: str
    pipeline_ranks: int
    stages_per_rank: int
    data_parallel_size: int
    micro_batch: int
    num_microbatches: int
    recompute: bool
    step_s: float
    compute_s: float
    target_s: float
    memory_bytes: float
    sent_bytes: float
    notes: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.micro_batch * self.num_microbatches * self.data_parallel_size

    @property
    def utilization(self) -> float:
        """Part of a step that is computing."""
        return self.compute_s / self.step_s

    @property
    def bubble_fraction(self) -> float:
        """Part of a step that ranks wait for others, by the formula."""
        return bubble_fraction(self.pipeline_ranks, self.num_microbatches, self.stages_per_rank)


def advise_pipeline(
    model: PipelineModel,
    cluster: PipelineCluster,
    *,
    critical_batch: float,
    min_steps: float = 1.0,
    schedules: Sequence[str] = LAYOUT_SCHEDULES,
    data_parallel: Sequence[str] = _STRATEGIES,
    max_micro_batch: int = 64,
    max_global_batch: int | None = None,
    gathers: str = "torch",
) -> list[PipelinePlan]:
    """Return layouts of all ranks that fit their memory, the one that reaches the target first.

        target_s = min_steps · step_s · (1 + critical_batch/global_batch)

    All divisors of the ranks are tried as pipeline ranks, with stages_per_rank, micro_batch and
    num_microbatches in about powers of two, num_microbatches a multiple of the pipeline ranks, with
    and without recomputation, of whole stages as `PipelineStrategy` does it. Under "fsdp2" a rank
    gathers as often as torch's pipeline runtime does, or as :func:`paper_gathers` says;
    "data_parallel" always as the latter, and a single stage is gathered only once. Each stage is
    reduced once in a step, and gradients stay whole until then. What is sent hides behind the
    passes of other stages, and behind all layers but one of its own stage.

    Args:
        model: its layers.
        cluster: ranks, memory and links.
        critical_batch: batch in samples at which steps are twice the fewest; at least 0.
        min_steps: the fewest steps to the target; 1 for times relative to each other.
        schedules: those to try, of "data_parallel" (no pipeline), "breadth_first", "gpipe", "1f1b"
            and "interleaved_1f1b".
        data_parallel: "ddp", "fsdp2" or both.
        max_micro_batch: largest micro-batch to try.
        max_global_batch: largest batch to try; ``None``: 16 times the critical batch, or a sample
            for each rank if that is more.
        gathers: "torch": 3 stages of a rank stay gathered; "paper": one at a time. Memory is that
            of the former.

    Returns:
        For each schedule, pipeline_ranks, stages_per_rank and data_parallel the fastest plan,
        ascending in ``target_s``.

    Raises:
        TypeError: if a number is not one.
        ValueError: if a number is out of range, a name unknown, no batch is small enough, or
            nothing fits the memory.

    Example:
        >>> from lightning_ext.scaling import Links
        >>> gpt = PipelineModel(64, 12 * 8192**2, 0.066, 2 * 8192 * 2048, 34 * 8192 * 2048)
        >>> slow = PipelineCluster(512, 80e9, Links(250e9, 3e9))
        >>> best = advise_pipeline(gpt, slow, critical_batch=2000)[0]
        >>> best.schedule, best.pipeline_ranks, best.data_parallel_size, best.global_batch
        ('breadth_first', 4, 128, 512)
    """
    require_positive("min_steps", min_steps)
    require_count("max_micro_batch", max_micro_batch)
    _require_names("schedules", schedules, LAYOUT_SCHEDULES)
    _require_names("data_parallel", data_parallel, _STRATEGIES)
    _require_names("gathers", [gathers], GATHERS)
    batch_efficiency(1, critical_batch)  # refuses what is no critical batch
    largest = max_global_batch
    if largest is None:
        largest = max(int(_LARGEST_BATCH * critical_batch), cluster.ranks)
    require_count("max_global_batch", largest)
    tried = [
        (memory_bytes(model, cluster, it), it._replace(gathers=gathers))
        for it in _candidates(model, cluster, schedules, data_parallel, max_micro_batch, largest)
    ]
    fitting = [(used, it) for used, it in tried if used <= cluster.memory_bytes]
    if not fitting:
        raise ValueError(_refusal([used for used, _ in tried], cluster, largest))
    best: dict[tuple[str, int, int, str], PipelinePlan] = {}
    for used, it in fitting:
        plan = _plan(model, cluster, it, used, critical_batch, min_steps)
        key = (plan.schedule, plan.pipeline_ranks, plan.stages_per_rank, plan.data_parallel)
        if key not in best or plan.target_s < best[key].target_s:
            best[key] = plan
    return sorted(best.values(), key=lambda plan: plan.target_s)


def _plan(
    model: PipelineModel,
    cluster: PipelineCluster,
    it: Candidate,
    used: float,
    critical_batch: float,
    min_steps: float,
) -> PipelinePlan:
    step_s, compute_s, sent = step_seconds(model, cluster, it)
    batch = it.micro_batch * it.shape.num_microbatches * it.data_parallel_size
    steps = min_steps * batch_efficiency(batch, critical_batch).steps_over_min
    schedule, ranks, loops, count = it.shape
    return PipelinePlan(
        schedule,
        it.data_parallel,
        ranks,
        loops,
        it.data_parallel_size,
        it.micro_batch,
        count,
        it.recompute,
        step_s,
        compute_s,
        steps * step_s,
        used,
        sent,
        layout_notes(it, critical_batch),
    )


def _candidates(
    model: PipelineModel,
    cluster: PipelineCluster,
    schedules: Sequence[str],
    data_parallel: Sequence[str],
    max_micro_batch: int,
    largest: int,
) -> Iterator[Candidate]:
    for shape in _shapes(model, cluster, schedules):
        size = cluster.ranks // shape.pipeline_ranks
        for micro_batch in _powers(max_micro_batch):
            if micro_batch * shape.num_microbatches * size > largest:
                break
            # One replica has nothing to reduce or gather: both are the same.
            for strategy in data_parallel if size > 1 else data_parallel[:1]:
                for recompute in (False, True):
                    yield Candidate(shape, strategy, size, micro_batch, recompute)


def _shapes(
    model: PipelineModel, cluster: PipelineCluster, schedules: Sequence[str]
) -> Iterator[Shape]:
    most = min(cluster.ranks, model.layers)
    for ranks in (n for n in range(1, most + 1) if cluster.ranks % n == 0):
        for schedule in schedules:
            for loops in _loops(schedule, ranks, model.layers // ranks):
                # Of one micro-batch on one rank there is but one order.
                is_layered = ranks == 1 and schedule == "breadth_first"
                for turns in _TURNS[is_layered:]:
                    yield Shape(schedule, ranks, loops, turns * ranks)


def _loops(schedule: str, ranks: int, most: int) -> Iterable[int]:
    """Stages of a rank that are worth a look."""
    if (ranks == 1) != (schedule == DATA_PARALLEL) and not (
        ranks == 1 and schedule == "breadth_first"
    ):
        return ()
    if ranks == 1:
        return (most,)
    if schedule in ("gpipe", "1f1b"):
        return (1,)
    return sorted({*_powers(most), most} - {1})


def _powers(largest: int) -> list[int]:
    return [2**k for k in range(largest.bit_length())]


def _require_names(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [each for each in given if each not in allowed]
    if unknown or not given or isinstance(given, str):
        raise ValueError(f"{name}={given!r} is not allowed; give a list of {', '.join(allowed)}")


def _refusal(used: Sequence[float], cluster: PipelineCluster, largest: int) -> str:
    if not used:
        return (
            f"max_global_batch={largest} is less than one sample for each of {cluster.ranks} "
            "ranks; use fewer ranks or a larger batch"
        )
    return (
        f"memory_bytes={cluster.memory_bytes:.4g} of a rank hold no layout of {cluster.ranks} "
        f"ranks; the smallest takes {min(used):.4g}: use more ranks or a smaller model, allow "
        "'fsdp2' and 'breadth_first', or stash less"
    )
