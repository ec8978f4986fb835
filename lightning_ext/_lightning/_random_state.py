"""The random generators of every rank, in types that a weights-only load accepts.

Private: ``fit_loop._combined_loader``.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ext._lightning._view import view


def random_state(trainer: Trainer) -> list[dict[str, Any]]:
    """Collects the Python, NumPy, torch, device and loader generators of all ranks.

    It is a collective: every rank must call.
    """
    seen = view(trainer)
    state = _local_state() | {"loader": [g.get_state() for g in _loader_generators(trainer)]}
    if seen.data_parallel_size == 1:
        return [state]
    states: list[Any] = [None] * seen.data_parallel_size
    dist.all_gather_object(states, state, group=seen.data_parallel_group)
    return states


def restore_random_state(trainer: Trainer, states: list[dict[str, Any]] | None) -> None:
    """Sets this rank's generators as they were saved, if they were."""
    if states is None:
        return
    seen = view(trainer)
    if len(states) != seen.data_parallel_size:
        rank_zero_warn(
            f"The checkpoint holds the random state of {len(states)} ranks and there are now"
            f" {seen.data_parallel_size}: generators go on from the seed, not from the checkpoint."
        )
        return
    state = states[seen.data_parallel_rank]
    _set_local_state(state)
    for generator, saved in zip(_loader_generators(trainer), state["loader"], strict=True):
        generator.set_state(saved)


def _loader_generators(trainer: Trainer) -> list[torch.Generator]:
    """Generators that the user gave to the train loader or to its sampler, each once."""
    loaders = trainer.fit_loop._combined_loader
    found: dict[int, torch.Generator] = {}
    for loader in loaders.flattened if loaders is not None else ():
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        for owner in (loader, sampler):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _local_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position)],
        "numpy_gauss": [int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_local_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, *state["numpy_gauss"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
