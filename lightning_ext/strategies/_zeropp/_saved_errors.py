"""Errors of rounding in a checkpoint, which are of a rank and of nothing that is sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_ext.strategies._zeropp._quantized_reduce_scatter import QuantizedReduceScatter


def save_errors(reductions: Mapping[str, QuantizedReduceScatter], folder: Path) -> None:
    """Writes this rank's errors beside the shards.

    Args:
        reductions: By the names of units.
        folder: Of the checkpoint; all ranks must call.
    """
    states = {name: one.state_dict() for name, one in reductions.items()}
    torch.save(states, _file(folder, dist.get_rank()))
    if dist.get_rank() == 0:  # of a larger world that wrote here before
        rank = dist.get_world_size()
        while (stale := _file(folder, rank)).exists():
            stale.unlink()
            rank += 1
    dist.barrier()


def load_errors(reductions: Mapping[str, QuantizedReduceScatter], folder: Path) -> None:
    """Takes this rank's errors over, if the same ranks saved them; else they start at zero.

    Args:
        reductions: By the names of units.
        folder: Of the checkpoint, or a file, which has none.
    """
    path = _file(folder, dist.get_rank())
    states = torch.load(path, weights_only=True) if path.is_file() else {}
    for name, one in reductions.items():
        if name in states:
            one.load_state_dict(states[name])
        else:
            one.reset()


def _file(folder: Path, rank: int) -> Path:
    return folder / f"errors_{rank}.pt"
