"""Whole weights in one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_ext._lightning import weights_only_checkpoint


def write_weights(trainer: Trainer, path: Path, weights: Callable[[], dict[str, Any]]) -> None:
    """Writes what ``LightningModule.load_from_checkpoint`` reads; all ranks must call.

    Args:
        trainer: Its hooks, and callbacks that put averages into files, are heard.
        path: Of the file, on rank 0.
        weights: Gives whole ones on rank 0, with the help of all.
    """
    checkpoint = weights_only_checkpoint(trainer, weights)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)
    dist.barrier()
