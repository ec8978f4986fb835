"""Weights as rows of numbers: read, moved by their rows, and written back in the form they have.

Differs: a weight that brings ``requantize_`` is written by it, so that codes may be rounded at
    random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.optim._step._shards import local_part, zeros_like_rows

LENGTHS = ("length_avg", "length_avg_sq")


def rows_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a matrix or convolution, shape (rows here, rest)."""
    return local_part(tensor).flatten(1)


def is_coded(param: Tensor) -> bool:
    """Whether a weight is kept in codes, and written by ``requantize_`` alone."""
    return hasattr(param, "requantize_")


def read_rows(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of this rank's rows of a weight.

    Args:
        param: the weight, which may be in codes: its ``dequantize(dtype)`` gives the numbers.
        dtype: of the result. What the weight is seen in may be too coarse: numbers rounded at
            each step, always in the same direction, would move.
    """
    weight: Any = param
    return rows_of(weight.dequantize(dtype) if is_coded(param) else param).to(dtype)


def write_rows(param: Tensor, new: Tensor, *, seed: int, step: int, stream: int) -> None:
    """Write this rank's rows of a weight.

    Args:
        param: the weight.
        new: its rows.
        seed: of the bits by which codes are rounded.
        step: likewise.
        stream: likewise.
    """
    here: Any = local_part(param)
    if is_coded(param):
        here.requantize_(new.reshape(here.shape), seed=seed, step=step, stream=stream)
    else:
        here.copy_(new.reshape(here.shape))


def moved(weight: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return rows after a step: (1 − lr·λ)w − lr·U.

    Args:
        weight: rows w.
        update: U, of the same shape; its memory is used.
        group: says ``lr`` and ``weight_decay``.
    """
    lr, decay = group["lr"], group["weight_decay"]
    kept = weight * (1 - lr * decay) if decay else weight
    if isinstance(lr, Tensor):
        return kept - lr * update
    return torch.sub(kept, update, alpha=lr, out=update)


def start_lengths(param: Tensor) -> dict[str, Tensor]:
    """Return the moments of the lengths of a weight's rows, split as the rows are."""
    wide = torch.promote_types(param.dtype, torch.float32)
    return {name: zeros_like_rows(param).to(wide) for name in LENGTHS}


def moved_by_lengths(
    weight: Tensor, update: Tensor, length_grad: Tensor, state: dict[str, Tensor], group: Any
) -> Tensor:
    """Return rows whose directions and lengths have taken a step, the latter Adam's.

    Args:
        weight: rows.
        update: of their directions.
        length_grad: of their lengths, shape (rows, 1).
        state: of the weight.
        group: its settings.
    """
    moments = [local_part(state[name]) for name in LENGTHS]
    zero = torch.zeros_like(length_grad)
    mean, square = (x.view_as(zero) for x in moments)
    step, *new = functional.adamw_update(
        zero,
        length_grad,
        mean,
        square,
        state["step"],
        lr=-1.0,
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=0.0,
    )
    for old, value in zip(moments, new, strict=True):
        old.copy_(value.view_as(old))
    lr, decay = group["lr"], group["weight_decay"]
    found = functional.weight_norm_step(weight, lr * update, lr * step)
    return found - (lr * decay) * weight if decay else found
