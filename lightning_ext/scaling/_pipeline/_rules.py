"""Rules of the literature about layouts, as comments on one.

Source: Huang et al. 2019 (GPipe, arXiv:1811.06965, section 2.3), M ≥ 4K; Lamy-Poirier 2023
    (arXiv:2211.05953), abstract, and 2021 (arXiv:2106.02679), abstract; Hagemann et al. 2023
    (arXiv:2311.05610) and Dash et al. 2023 (arXiv:2312.12705), from memory.
Differs: thresholds without a number in their source are ours.
"""

from __future__ import annotations

from lightning_ext.scaling._pipeline._bubble import bubble_fraction
from lightning_ext.scaling._pipeline._gathers import TORCH_ACTIVE_STAGES
from lightning_ext.scaling._pipeline._layout import Candidate

_LARGE_BUBBLE = 0.1


def layout_notes(it: Candidate, critical_batch: float) -> tuple[str, ...]:
    """Return which rules a layout does not follow, with their sources."""
    _, ranks, loops, count = it.shape
    batch = it.micro_batch * count * it.data_parallel_size
    idle = bubble_fraction(ranks, count, loops)
    rules = {
        f"fewer micro-batches ({count}) than 4 for each pipeline rank (Huang et al. 2019)": (
            ranks > 1 and loops == 1 and count < 4 * ranks
        ),
        f"a bubble of {idle:.0%}: more micro-batches for each pipeline rank, or more stages on "
        "each (Dash et al. 2023)": idle > _LARGE_BUBBLE,
        f"stages are gathered for each of {it.shape.groups} groups of micro-batches, not once for "
        "all (Lamy-Poirier 2023)": (
            it.data_parallel == "fsdp2"
            and it.shape.groups > 1
            and loops > (1 if it.gathers == "paper" else TORCH_ACTIVE_STAGES)
            and it.data_parallel_size > 1
        ),
        "micro-batches above 1 on a pipeline (Hagemann et al. 2023)": (
            ranks > 1 and it.micro_batch > 1
        ),
        "layers are computed again; more model parallelism may avoid it (Hagemann et al. 2023)": (
            it.recompute
        ),
        f"a batch of {batch} above the critical one: more than half of the samples bring no "
        "progress (McCandlish et al. 2018)": batch > critical_batch,
    }
    return tuple(text for text, is_broken in rules.items() if is_broken)
