"""Contrastive losses of sums of exponentials, whichever function takes the sums.

Source: see ``functional.clip_loss``, ``info_nce_loss`` and ``nt_xent_loss``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_ext.functional._contrastive._blocks import BlockLogSumExp
from lightning_ext.functional._contrastive._inputs import check_pair, check_reduction

Reduction = Literal["mean", "sum", "none"]
Sums = Callable[..., BlockLogSumExp]  # with the arguments of block_logsumexp
MirroredSums = Callable[[Tensor, Tensor | float, Tensor], BlockLogSumExp]


def clip_by(
    sums: Sums, image: Tensor, text: Tensor, scale: Tensor | float, reduction: str
) -> Tensor:
    """Return ``clip_loss``."""
    _check_equal(image, text, ("image", "text"), reduction)
    found = sums(image, text, scale)
    return reduced((found.rows + found.columns) / 2 - found.positives, image, reduction)


def info_nce_by(
    sums: Sums,
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    labels: Tensor | None,
    excluded: Tensor | None,
    reduction: str,
) -> Tensor:
    """Return ``info_nce_loss``."""
    check_pair(query, key, ("query", "key"))
    check_reduction(reduction)
    if labels is None and len(key) < len(query):
        raise ValueError(
            f"{len(query)} queries and {len(key)} keys; with fewer keys than queries give labels"
        )
    found = sums(query, key, scale, labels=labels, excluded=excluded, columns=False)
    losses = found.rows - found.positives
    if labels is not None:
        known = (labels >= 0) & (labels < len(key))
        losses = torch.where(known, losses, torch.nan)
    return reduced(losses, query, reduction)


def nt_xent_by(
    sums: MirroredSums, a: Tensor, b: Tensor, scale: Tensor | float, reduction: str
) -> Tensor:
    """Return ``nt_xent_loss``; the sums are those of ``mirrored_logsumexp``."""
    _check_equal(a, b, ("a", "b"), reduction)
    views = torch.cat([a, b])
    pair = torch.arange(len(views), device=a.device).roll(len(a))
    found = sums(views, scale, pair)
    return reduced(found.rows - found.positives, a, reduction)


def reduced(losses: Tensor, like: Tensor, reduction: str) -> Tensor:
    """Return the mean or the sum of losses or themselves, at least in float32."""
    check_reduction(reduction)
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return losses.to(torch.promote_types(like.dtype, torch.float32))


def _check_equal(x: Tensor, y: Tensor, names: tuple[str, str], reduction: str) -> None:
    check_pair(x, y, names)
    check_reduction(reduction)
    if x.shape != y.shape:
        (a, b), shapes = names, (tuple(x.shape), tuple(y.shape))
        raise ValueError(f"{a} has shape {shapes[0]}, {b} {shapes[1]}; they must be equal")
