"""Bytes of a training step on one rank, part by part, and which part binds.

Source: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, sections 3.1 and 5), states and activations
    as the two consumers of memory; Zhao et al. 2023 (PyTorch FSDP, arXiv:2304.11277), units that
    are gathered ahead; Narayanan et al. 2021 (arXiv:2104.04473), activations of a pipeline by the
    micro-batches in flight.
Differs: bytes are counted on the module at hand and not per parameter; stages may be unequal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_ext.scaling._memory_model import MemoryModel
from lightning_ext.scaling._pipeline._gathers import TORCH_ACTIVE_STAGES
from lightning_ext.scaling._pipeline._timeline import PipelineTimeline
from lightning_ext.scaling._validate import require_count, require_non_negative

_SHARDED = frozenset({"fsdp2", "zeropp", "zeropp_deepspeed", "deepspeed_stage_3"})
_PIPELINES = frozenset(
    {"breadth_first_pipeline", "gpipe", "pipeline_1f1b", "pipeline_interleaved_1f1b"}
)
_SPLIT_STATES = _SHARDED | {"deepspeed_stage_1", "deepspeed_stage_2"}
_MEANS = {
    "weights": "weights in bfloat16",
    "gradients": "one micro-batch a step, so that FSDP2 keeps none of them whole",
    "states": "keep them in fewer bits (state_dtype='int8'), of low rank or factored",
}
_ADVICE = {
    "activations": "a smaller micro-batch with more accumulation, or activation checkpointing",
    "gathered": "smaller units, such as one layer each",
    "copies": "fewer of them: gradient_as_bucket_view=True under DDP, hpz=False or no error "
    "feedback under ZeRO++",
    "buffers": "buffers in a smaller dtype, or made where they are used",
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step, on the rank that needs most.

        total = weights + buffers + gradients + states + activations + gathered + copies

    Temporary tensors and what an allocator rounds up are in none of them.

    Args:
        strategy: by the name that a Trainer takes.
        ranks: all of them.
        micro_batch: samples of one forward pass on one rank.
        weights_bytes: parameters that the rank keeps.
        gradients_bytes: the most that there is of their gradients.
        states_bytes: what the optimizer keeps after its first step.
        activations_bytes: what forward passes keep for backward passes, of all in flight.
        buffers_bytes: buffers of the module.
        gathered_bytes: weights and gradients that are whole for a while, and else sharded.
        copies_bytes: buckets of DDP; of ZeRO++ the secondary partition and errors of rounding.

    Raises:
        TypeError: if a number is not one.
        ValueError: if a number is out of range.

    Example:
        >>> plan = MemoryPlan("single", 1, 8, 400.0, 400.0, 800.0, 160.0)
        >>> plan.total_bytes, plan.binds, plan.largest_micro_batch(2000, margin=0)
        (1760.0, 'states', 20)
    """

    strategy: str
    ranks: int
    micro_batch: int
    weights_bytes: float
    gradients_bytes: float
    states_bytes: float
    activations_bytes: float
    buffers_bytes: float = 0.0
    gathered_bytes: float = 0.0
    copies_bytes: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what has no size."""
        require_count("ranks", self.ranks)
        require_count("micro_batch", self.micro_batch)
        for name, value in self.parts.items():
            require_non_negative(f"{name}_bytes", value)

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each part by its name, "weights" first."""
        ending = "_bytes"
        return {k.removesuffix(ending): v for k, v in vars(self).items() if k.endswith(ending)}

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def binds(self) -> str:
        """The part that takes most."""
        parts = self.parts
        return max(parts, key=lambda name: parts[name])

    @property
    def advice(self) -> str:
        """One sentence about what makes the part that binds smaller."""
        verb = "take" if self.binds.endswith("s") else "takes"
        share = self.parts[self.binds] / self.total_bytes if self.total_bytes else 0.0
        means = _ADVICE.get(self.binds) or self._of_states()
        head = self.binds.capitalize()
        return f"{head} {verb} most, {share:.0%} of {_readable(self.total_bytes)}: {means}."

    def largest_micro_batch(self, budget_bytes: float, *, margin: float = 0.1) -> int:
        """Return the largest micro-batch that fits, if activations grow in proportion to it.

        Args:
            budget_bytes: what a rank has; above 0.
            margin: part of it to leave free, in [0, 1).

        Raises:
            TypeError: if a value is not a number.
            ValueError: if a value is out of range, not one sample fits, or any number does.
        """
        fixed = self.total_bytes - self.activations_bytes
        model = MemoryModel(fixed, self.activations_bytes / self.micro_batch)
        return model.largest(budget_bytes, margin=margin)

    def __str__(self) -> str:
        """Return a table, a row for each part that is there."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        rows = [f"{self.strategy} on {ranks}, micro_batch {self.micro_batch}; of a rank:"]
        for name, value in {**self.parts, "total": self.total_bytes}.items():
            if value:
                rows.append(f"{name:<12}{_readable(value):>12}{value / self.total_bytes:>7.1%}")
        return "\n".join([*rows, self.advice])

    def _of_states(self) -> str:
        """What helps where weights, gradients or states bind."""
        means = _MEANS[self.binds]
        if self.strategy in _PIPELINES:
            return f"{means}, or more pipeline ranks"
        if self.strategy in _SPLIT_STATES and (self.binds == "states" or self.ranks > 1):
            return f"{means}, or more ranks"
        return f"{means}, or shard them with strategy='fsdp2' on several ranks"

    @staticmethod
    def gathered(units: Sequence[float], root: float = 0.0) -> float:
        """Return the bytes that FSDP2 has whole at one moment.

            root + max over i of (unit_i + unit_{i+1})

        Each unit is gathered while its neighbour computes; the root stays gathered.

        Args:
            units: whole bytes of each unit, in the order in which they run.
            root: of what is outside of them.

        Raises:
            TypeError: if a value is not a number.
            ValueError: if one is out of range.

        Example:
            >>> MemoryPlan.gathered([3, 4, 2], root=10)
            17
        """
        for value in (*units, root):
            require_non_negative("bytes of a unit", value)
        return root + max((a + b for a, b in pairwise(units)), default=sum(units))

    @staticmethod
    def gathered_stages(
        weights: Sequence[float], gradients: Sequence[float], *, breadth_first: bool
    ) -> float:
        """Return the bytes of stages that a rank of a pipeline on FSDP2 has whole at one moment.

        torch's runtime keeps three stages gathered. Breadth-first reduces a stage while the next
        one computes, so that gradients of two are whole; others keep all gradients whole, which
        are no part of this.

        Args:
            weights: whole bytes of each stage of the rank.
            gradients: the same of their gradients.
            breadth_first: whether all micro-batches pass a stage before the next.
        """
        whole = sum(sorted(weights)[-TORCH_ACTIVE_STAGES:])
        return whole + (sum(sorted(gradients)[-2:]) if breadth_first else 0)

    @staticmethod
    def in_flight(timeline: PipelineTimeline, stage_bytes: Sequence[float]) -> tuple[float, ...]:
        """Return for each rank the most bytes of activations that it holds in a batch.

            max over t of Σ_{(stage, micro-batch) forward and not yet backward at t} bytes_stage

        Args:
            timeline: of one batch.
            stage_bytes: what each stage keeps of one micro-batch.

        Raises:
            ValueError: if there are not as many as stages.

        Example:
            >>> from lightning_ext.scaling import pipeline_timeline
            >>> found = pipeline_timeline("1f1b", pipeline_ranks=2, num_microbatches=4)
            >>> MemoryPlan.in_flight(found, [10, 30])
            (20.0, 30.0)
        """
        stages = timeline.pipeline_ranks * timeline.stages_per_rank
        if len(stage_bytes) != stages:
            raise ValueError(f"stage_bytes has {len(stage_bytes)} numbers for {stages} stages")
        ranks = range(timeline.pipeline_ranks)
        return tuple(_most_held(timeline, rank, stage_bytes) for rank in ranks)


def _most_held(timeline: PipelineTimeline, rank: int, stage_bytes: Sequence[float]) -> float:
    held = most = 0.0
    for action in timeline.of_rank(rank, is_pass=True):
        held += stage_bytes[action.stage] * (1 if action.kind == "forward" else -1)
        most = max(most, held)
    return most


def _readable(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
