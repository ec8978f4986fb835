"""Launches of the kernels in ``_norm_rows``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lightning_ext.kernels._triton._norm_rows import (
    norm_backward_kernel,
    norm_forward_kernel,
    norm_sums_kernel,
    wide_norm_backward_kernel,
)

_WIDEST = 8192  # features of which a row, its gradient and two sums stay in registers
_WIDEST_FORWARD = 16384
_WIDE_BLOCK = 512  # columns at a time beyond
_PROGRAMS = 512  # a few for each multiprocessor
_RUN = (16, 128)  # rows of a program: fewer leave many sums, more leave multiprocessors idle
_SUM_RUNS = 32  # that are added up by one program where samples do not matter


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Attributes:
        x: shape (samples, …, features).
        weight: γ or ``None``.
        has_bias: whether there is β.
        mean: of each row, float32, ``None`` in RMS normalization.
        rstd: 1/√(var + eps) of each row, float32.
    """

    x: Tensor
    weight: Tensor | None
    has_bias: bool
    mean: Tensor | None
    rstd: Tensor


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centered: bool
) -> tuple[Tensor, Saved]:
    """Return y and what the backward pass needs."""
    rows = _rows(x)
    count, features = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else None
    saved = Saved(x, weight, bias is not None, mean, rstd)
    if count == 0:
        return y, saved
    in_one = features <= _WIDEST_FORWARD
    block = triton.next_power_of_2(features) if in_one else 4096
    per_program = max(1, 4096 // block)
    norm_forward_kernel[(triton.cdiv(count, per_program),)](
        rows,
        rows if weight is None else weight.contiguous(),
        rows if bias is None else bias.contiguous(),
        y,
        rstd if mean is None else mean,
        rstd,
        count,
        features,
        rows.stride(0),
        float(eps),
        CENTERED=centered,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        ROWS=per_program,
        BLOCK=block,
        IN_ONE=in_one,
        num_warps=_warps(per_program * block, 32),
    )
    return y, saved


def backward(
    d: Tensor, saved: Saved, *, sums: bool, sample_sq_norms: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ∂L/∂x, and ∂L/∂γ and ∂L/∂β in float32 where asked for by ``sums``.

    ``sample_sq_norms`` is added to, as ``functional.layer_norm`` says.
    """
    x, weight = saved.x, saved.weight
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kinds = (2 if saved.has_bias else 1) if sums and weight is not None else 0
    if x.numel() == 0:
        totals = saved.rstd.new_zeros(kinds, x.shape[-1])
    else:
        plan = _plan(x, sample_sq_norms is not None)
        partials = saved.rstd.new_empty(kinds, plan.programs, x.shape[-1])
        squares = saved.rstd.new_empty(kinds, x.shape[0])
        _launch_backward(d, saved, plan, dx, partials, squares)
        totals = _added(partials, plan, sample_sq_norms) if kinds else partials
        if sample_sq_norms is not None and plan.by_row:
            sample_sq_norms.add_(squares)
    return dx, totals[0] if kinds else None, totals[1] if kinds == 2 else None


class _Plan(NamedTuple):
    """How rows are dealt out.

    Attributes:
        samples: runs end where samples end; 1 if they need not.
        positions: rows of a sample.
        runs: of a sample.
        length: rows of a run.
        by_row: whether each row is a sample of its own.
        by_sample: whether norms are taken of the sums of a sample.
    """

    samples: int
    positions: int
    runs: int
    length: int
    by_row: bool
    by_sample: bool

    @property
    def programs(self) -> int:
        return self.samples * self.runs


def _plan(x: Tensor, with_norms: bool) -> _Plan:
    count = x.numel() // x.shape[-1]
    by_sample = with_norms and count > x.shape[0]
    samples = x.shape[0] if by_sample else 1
    positions = count // samples
    length = min(max(triton.cdiv(count, _PROGRAMS), _RUN[0]), _RUN[1])
    runs = triton.cdiv(positions, length)
    # Runs of about the same length.
    return _Plan(
        samples,
        positions,
        runs,
        triton.cdiv(positions, runs),
        with_norms and not by_sample,
        by_sample,
    )


def _launch_backward(
    d: Tensor, saved: Saved, plan: _Plan, dx: Tensor, partials: Tensor, squares: Tensor
) -> None:
    rows, gradient = _rows(saved.x), _rows(d)
    features = rows.shape[1]
    wide = features > _WIDEST
    block = _WIDE_BLOCK if wide else triton.next_power_of_2(features)
    per_step = 8 if wide else max(1, 2048 // block)
    (wide_norm_backward_kernel if wide else norm_backward_kernel)[(plan.programs,)](
        gradient,
        rows,
        rows if saved.weight is None else saved.weight.contiguous(),
        saved.rstd if saved.mean is None else saved.mean,
        saved.rstd,
        dx,
        partials,
        squares,
        plan.positions,
        features,
        gradient.stride(0),
        rows.stride(0),
        plan.runs,
        plan.length,
        CENTERED=saved.mean is not None,
        HAS_WEIGHT=saved.weight is not None,
        SUMS=len(partials),
        BY_ROW=plan.by_row,
        ROWS=per_step,
        BLOCK=block,
        num_warps=_warps(per_step * block, 8),
    )


def _added(partials: Tensor, plan: _Plan, sample_sq_norms: Tensor | None) -> Tensor:
    """The sums of all runs; the squares of each sample's are added to ``sample_sq_norms``."""
    kinds, count, features = partials.shape
    samples, runs = plan.samples, plan.runs
    if not plan.by_sample:
        samples, runs = triton.cdiv(count, _SUM_RUNS), _SUM_RUNS
    block = min(max(64, triton.next_power_of_2(features) // 64), 512)
    blocks = triton.cdiv(features, block)
    length = triton.cdiv(samples, max(1, _PROGRAMS // (2 * blocks * kinds)))
    parts = triton.cdiv(samples, length)
    totals = partials.new_empty(kinds, parts, features)
    squares = partials.new_empty(kinds, blocks, samples if plan.by_sample else 0)
    norm_sums_kernel[(blocks, parts, kinds)](
        partials,
        totals,
        squares,
        count,
        samples,
        runs,
        features,
        length,
        BY_SAMPLE=plan.by_sample,
        ROWS=min(2048 // block, triton.next_power_of_2(runs)),
        BLOCK=block,
        num_warps=4,
    )
    if plan.by_sample and sample_sq_norms is not None:
        sample_sq_norms.add_(squares.sum(1))
    return totals[:, 0] if parts == 1 else totals.sum(1)


def _rows(x: Tensor) -> Tensor:
    """Rows whose entries lie side by side, and not too far apart; a copy where they do not."""
    rows = x.reshape(-1, x.shape[-1])
    # Offsets within a tile, of 8 rows or 4096 entries at most, have 32 bits.
    near = max(8, 4096 // rows.shape[1]) * rows.stride(0) < 2**31
    return rows if rows.stride(1) == 1 and near else rows.contiguous()


def _warps(entries: int, per_thread: int) -> int:
    return max(1, min(16, triton.next_power_of_2(entries // (32 * per_thread))))
