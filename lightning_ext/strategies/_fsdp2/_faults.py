"""What a rank says when others are gone, late or set up otherwise."""

from __future__ import annotations

import re
import zlib
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn

# Of gloo's errors, which are plain ones.
_LOST = re.compile(
    r"\b(gloo|nccl|(closed|reset) by peer|Timed out waiting \d+ms|monitoredBarrier)\b"
)
_LATE = re.compile(r"\b(timed out|timeout|monitoredBarrier)\b", re.IGNORECASE)


def explain(exception: BaseException, timeout: timedelta | None) -> None:
    """Adds to an error of a collective what it is likely to mean.

    Args:
        exception: Any; others are left alone.
        timeout: How long a rank waits.
    """
    if not _is_of_a_collective(exception):
        return
    late = f", or did not come within timeout={timeout}" if _LATE.search(str(exception)) else ""
    exception.add_note(
        f"Rank {dist.get_rank() if dist.is_initialized() else '?'} lost the others in a"
        f" collective: one of them ended with an error of its own, or was killed{late}. Its own"
        " output tells why. Hint: start again with ckpt_path= the last checkpoint."
    )


def _is_of_a_collective(exception: BaseException) -> bool:
    if isinstance(exception, dist.DistError):
        return True
    return type(exception) is RuntimeError and _LOST.search(str(exception)) is not None


def require_module(module: LightningModule | None, strategy: str) -> LightningModule:
    """The module of a strategy that a Trainer has set up.

    Args:
        module: Of the strategy.
        strategy: Its name.

    Raises:
        RuntimeError: There is none yet.
    """
    if module is None:
        raise RuntimeError(
            f"{strategy} has no module yet: a Trainer has to set it up first. Hint:"
            f" Trainer(strategy=strategy), and this in a hook or after fit."
        )
    return module


def run_settings(trainer: Trainer, module: nn.Module) -> dict[str, object]:
    """What decides, beside a strategy's own settings, which collectives a rank calls.

    Args:
        trainer: With its strategy.
        module: On any device.
    """
    strategy: Any = trainer.strategy
    return {
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "precision": trainer.precision,
        "save_distributed_checkpoint": strategy._save_distributed_checkpoint,
        "process_group_backend": strategy._process_group_backend,
        "the module": fingerprint(module),
    }


def fingerprint(module: nn.Module) -> str:
    """Says which parameters a module has: their number, size, and a checksum of names and shapes.

    Args:
        module: On any device.
    """
    found = dict(module.named_parameters())
    rows = [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in found.items()]
    numbers = sum(p.numel() for p in found.values())
    checksum = zlib.crc32("\n".join(rows).encode())
    return f"{len(rows)} parameters with {numbers} numbers, checksum {checksum:08x}"
