"""Random numbers that depend on what is computed, not on the rank that computes it.

Draws are those of torch's generators of the host and of the device; Python's and numpy's are left
alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# In the place of a layer: what a step does before and after the stages, and pipeline_loss.
OUTSIDE, LOSS = -1, -2


def layer_seed(
    seed: int, replica: int, step: int, micro_batch: int, layer: int, call: int = 0
) -> int:
    """Seed of one layer's random numbers in one micro-batch: 63 bits of a hash.

    Args:
        seed: Of the run.
        replica: Index of the data-parallel rank.
        step: Batches of the fit before this one.
        micro_batch: Index within the batch.
        layer: Index in the split submodule, or one of the constants above.
        call: 0 in training; in evaluation, calls of the submodule since the last training step.
    """
    return digest(f"{seed},{replica},{step},{micro_batch},{layer},{call}")


def digest(text: str) -> int:
    """63 bits of a hash of a text.

    Args:
        text: Any.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws from a seed, and leaves the generators as they were.

    Args:
        seed: At least 0.
        device: Of which the generator is seeded, beside the host's.
    """
    # Not torch.manual_seed, which seeds all devices, and takes a millisecond for those it has not.
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [one.get_state() for one in generators]
    for one in generators:
        one.manual_seed(seed)
    try:
        yield
    finally:
        for one, state in zip(generators, before, strict=True):
            one.set_state(state)


def align_generators(group: dist.ProcessGroup, device: torch.device) -> None:
    """Gives the ranks of a pipeline the generators of the first one; all of them must call.

    Args:
        group: Of the pipeline.
        device: Of which the generator is aligned, beside the host's.
    """
    own = [torch.get_rng_state()]
    if device.type != "cpu":
        own.append(torch.get_device_module(device).get_rng_state(device))
    dist.broadcast_object_list(own, dist.get_global_rank(group, 0), group=group)
    torch.set_rng_state(own[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(own[1], device)
