"""Whole weights of a module that ranks hold parts of, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_ext.strategies._export import write_weights


def export(module: LightningModule, path: Path) -> None:
    """Writes what ``LightningModule.load_from_checkpoint`` reads; all ranks must call.

    Args:
        module: A sharded one.
        path: Of the file, on rank 0.
    """

    def whole() -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(module, options=options)

    write_weights(module.trainer, path, whole)
