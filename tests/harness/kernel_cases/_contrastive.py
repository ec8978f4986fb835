"""Calls of the contrastive losses and of their blocks, with every gradient they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness._kernel_case import Cast, KernelCase, Run
from lightning_ext import kernels

HALF = (torch.bfloat16, torch.float16)
WHOLE = ("contiguous",)


def _rows(cast: Cast, rows: int, width: int) -> Tensor:
    return cast(F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1))


def _scalar(cast: Cast, value: float) -> Tensor:
    return cast(torch.tensor(value, dtype=torch.float64), torch.float32).requires_grad_()


def _loss(
    op: str,
    shape: tuple[int, int, int],
    *scalars: float,
    extra: Callable[[int, int], dict[str, Tensor]] | None = None,
    reduction: str = "mean",
) -> Run:
    """Value and gradients of a loss of m and n rows."""
    m, n, width = shape

    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        x, y = _rows(cast, m, width).requires_grad_(), _rows(cast, n, width).requires_grad_()
        numbers = [_scalar(cast, value) for value in scalars]
        given: dict[str, Any] = {} if extra is None else extra(m, n)
        given = {name: cast(value) for name, value in given.items()}
        loss = getattr(kernels, op)(x, y, *numbers, **given, reduction=reduction, fused=fused)
        loss.backward(torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device)
                      .view(loss.shape))  # fmt: skip
        gradients = zip(("x", "y", "scale", "bias"), (x, y, *numbers), strict=False)
        found = {f"{name} gradient": p.grad for name, p in gradients if p.grad is not None}
        return {"loss": loss.detach()} | found

    return run


def _labels(m: int, n: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(n, (m,))}


def _some_labels(m: int, n: int) -> dict[str, Tensor]:
    """A third of the rows have their positive elsewhere."""
    return {"labels": torch.randint(-n // 4, n + n // 4, (m,))}


def _masked(m: int, n: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(n, (m,)), "excluded": torch.rand(m, n) < 0.3}


def _masked_columns(m: int, n: int) -> dict[str, Tensor]:
    return {"excluded": torch.rand(n) < 0.3}


def _blocks(shape: tuple[int, int, int], *, two_sided: bool = True, masked: bool = False) -> Run:
    """Sums of a block, and what it adds to gradients if others have more."""
    m, n, width = shape

    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        x, y, scale = _rows(cast, m, width), _rows(cast, n, width), _scalar(cast, 7.0).detach()
        masks: dict[str, Any] = {"labels": cast(torch.arange(m) - m // 3)}
        masks["own"] = cast(torch.arange(m) + 1)
        if masked:
            masks["excluded"] = cast(torch.rand(m, n) < 0.5)
        sums = kernels.block_logsumexp(x, y, scale, **masks, columns=two_sided, fused=fused)
        floats = [cast(torch.randn(size, dtype=torch.float64), torch.float32) for size in (m, n, m)]
        by_row, by_column, by_positive = floats
        higher = [
            cast(torch.full((size,), 9.0, dtype=torch.float64), torch.float32) for size in (m, n)
        ]
        rows, columns = higher
        given = (rows, columns if two_sided else None, by_row, by_column if two_sided else None)
        grads = kernels.block_logsumexp_grads(
            x, y, scale, *given, by_positive, **masks, fused=fused
        )
        names = ("x gradient", "y gradient", "scale gradient")
        wide = torch.promote_types(x.dtype, torch.float32)
        found = {name: value.to(wide) for name, value in sums._asdict().items()}
        return found | dict(zip(names, _as_staged(x, *grads), strict=True))

    return run


def _as_staged(x: Tensor, dx: Tensor, dy: Tensor, *others: Tensor) -> list[Tensor]:
    """Gradients in x's dtype, in which kernels round each term of their sums; others are wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return [dx.to(x.dtype), dy.to(x.dtype), *(v.to(wide) for v in others)]


def _sigmoid_grads(m: int, n: int, width: int) -> Run:
    def run(cast: Cast, fused: bool | None) -> dict[str, Tensor]:
        x, y = _rows(cast, m, width), _rows(cast, n, width)
        weights = cast(torch.rand(m, dtype=torch.float64), torch.float32)
        labels = cast(torch.arange(m) - m // 3)
        found = kernels.siglip_grads(x, y, 10.0, -3.0, weights, labels=labels, fused=fused)
        names = ("x gradient", "y gradient", "scale gradient", "bias gradient")
        return dict(zip(names, _as_staged(x, *found), strict=True))

    return run


def _several(op: str, name: str, *shape: int, dtypes: Any = None, **given: Any) -> KernelCase:
    numbers = (10.0, -3.0) if op == "siglip_loss" else (10.0,)
    m, n, width = shape
    run = _loss(op, (m, n, width), *numbers, **given)
    if dtypes is not None:
        return KernelCase(op, name, run, dtypes=dtypes, layouts=WHOLE)
    return KernelCase(op, name, run)


FLOAT = (torch.float32,)
CASES = [
    _several("clip_loss", "one", 1, 1, 1),
    _several("clip_loss", "odd", 37, 37, 60),
    _several("clip_loss", "narrow", 16, 16, 20, dtypes=FLOAT, reduction="sum"),
    _several("clip_loss", "each", 33, 33, 48, dtypes=FLOAT, reduction="none"),
    _several("clip_loss", "several blocks", 150, 150, 100),
    _several("clip_loss", "whole blocks", 256, 256, 512, dtypes=HALF),
    _several("clip_loss", "empty", 0, 0, 8, reduction="sum"),
    _several("info_nce_loss", "one", 1, 1, 1, dtypes=FLOAT),
    _several("info_nce_loss", "more keys", 20, 70, 33),
    _several("info_nce_loss", "labels", 70, 20, 16, dtypes=FLOAT, extra=_labels),
    _several("info_nce_loss", "masked", 140, 135, 64, extra=_masked),
    _several("info_nce_loss", "masked columns", 30, 40, 24, dtypes=FLOAT, extra=_masked_columns),
    _several("info_nce_loss", "empty", 0, 3, 8, reduction="sum"),
    _several("nt_xent_loss", "one", 1, 1, 1, dtypes=FLOAT),
    _several("nt_xent_loss", "odd", 35, 35, 33),
    _several("nt_xent_loss", "several blocks", 66, 66, 64, reduction="none"),
    _several("nt_xent_loss", "whole blocks", 128, 128, 512, dtypes=HALF),
    _several("nt_xent_loss", "empty", 0, 0, 8, reduction="sum"),
    _several("siglip_loss", "one", 1, 1, 1, dtypes=FLOAT),
    _several("siglip_loss", "odd", 37, 37, 40),
    _several("siglip_loss", "a block of a ring", 40, 150, 33, extra=_some_labels),
    _several("siglip_loss", "several blocks", 150, 140, 64, dtypes=FLOAT, reduction="none"),
    _several("siglip_loss", "whole blocks", 256, 128, 512, dtypes=HALF, extra=_labels),
    _several("siglip_loss", "empty", 3, 0, 8, reduction="sum"),
    KernelCase("block_logsumexp", "two-sided", _blocks((65, 130, 40))),
    KernelCase("block_logsumexp", "one-sided", _blocks((70, 33, 64), two_sided=False), FLOAT),
    KernelCase("block_logsumexp_grads", "masked", _blocks((140, 70, 40), masked=True)),
    KernelCase("siglip_grads", "odd", _sigmoid_grads(37, 70, 40)),
]
