"""Seconds, stashed activations and groups of a pipeline in closed form, for thousands of ranks.

Source: derived from the timelines of `pipeline_timeline`, which they equal wherever there are at
    least as many micro-batches as pipeline ranks, and depth-first sends no longer
    than a pass; Lamy-Poirier 2023 (arXiv:2211.05953).
"""

from __future__ import annotations

from typing import NamedTuple

from lightning_ext.scaling._pipeline._orders import depth_first_rounds

DATA_PARALLEL = "data_parallel"
LAYOUT_SCHEDULES = ("data_parallel", "breadth_first", "gpipe", "1f1b", "interleaved_1f1b")


class Shape(NamedTuple):
    """The numbers of a layout; "data_parallel" is depth-first on one rank, a layer each stage."""

    schedule: str
    pipeline_ranks: int
    stages_per_rank: int
    num_microbatches: int

    @property
    def is_breadth_first(self) -> bool:
        """Whether a stage is done with all micro-batches before the next one starts."""
        return self.schedule in ("breadth_first", "gpipe")

    @property
    def groups(self) -> int:
        """How often all stages of a rank are gone through in a batch."""
        if self.is_breadth_first:
            return 1
        return depth_first_rounds(self.pipeline_ranks, self.num_microbatches)

    @property
    def stashed(self) -> int:
        """The most (stage, micro-batch) that rank 0 keeps activations of."""
        passes = self.stages_per_rank * self.num_microbatches
        if self.is_breadth_first:
            return passes
        if self.schedule == "1f1b":
            return min(passes, self.pipeline_ranks)
        group = self.num_microbatches // self.groups
        ahead = (self.stages_per_rank - 1) * group + 2 * (self.pipeline_ranks - 1)
        return min(passes, ahead + 1)

    def seconds(self, forward_s: float, backward_s: float, send_s: float) -> float:
        """Return the time of a batch with stages of equal cost.

        With f, b and s for a forward pass, a backward pass and a send, and P > 1:

        ================  ====================================================================
        breadth-first     Σ_{c = f, b}  (N−1)·max(M·c, P·(c+s)) + (P−1)·(c+s) + M·c
        1F1B              (P−1)·(f+b+2s) + M·(f+b) + 2s·(M−2−⌊(M−2)/P⌋)
        depth-first       (P−1)·(f+b+2s) + M·N·(f+b) + 2s·(N−1)·P
        ================  ====================================================================

        Breadth-first hides sends once M·c ≥ P·(c+s); the others wait for some of them. Depth-first
        this is too small for s > min(f, b), where `batch_seconds` replays the order.
        """
        _, ranks, loops, count = self
        both = forward_s + backward_s
        if ranks == 1:
            return count * loops * both
        if self.is_breadth_first:
            return sum(
                (loops - 1) * max(count * c, ranks * (c + send_s))
                + (ranks - 1) * (c + send_s)
                + count * c
                for c in (forward_s, backward_s)
            )
        ideal = (ranks - 1) * (both + 2 * send_s) + count * loops * both
        if self.schedule == "1f1b":
            return ideal + 2 * send_s * (count - 2 - (count - 2) // ranks)
        return ideal + 2 * send_s * (loops - 1) * ranks
