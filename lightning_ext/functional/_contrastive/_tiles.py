"""Loops over the tiles of a matrix of logits for sums of exponentials and their gradients.

Differs: the positives are kept out of the sums of a tile and added to them in float64, and so is
    what their gradients are made of: otherwise a loss below 1e-7 and its gradients are noise. Where
    all logits are small, no maximum is taken and one exponential serves rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows and columns of a tile. Of 512 to 4096, 1024 is the fastest on one thread, at widths of 64 to
# 1024. Several threads meet after each operation, which on a busy machine costs more than a larger
# tile does. That of other devices is not measured.
CPU_TILE, THREADS_TILE, OTHER_TILE = 1024, 2048, 4096
_SMALL = 30.0  # exp of that, and of its negative, may be summed and divided without a maximum
_LOWEST_EXPONENT = -60.0  # 1e-26 of a sum counts as none; exp is slow where it is denormal or 0
_LOWEST = -(2.0**100)  # in the place of -inf, so that no difference is nan


class Pairs(NamedTuple):
    """What is known of the pairs of rows and columns, but for their logits.

    ``mirrored`` rows are the columns, and label(label(i)) is i: of each pair of tiles that mirror
    each other one is computed.
    """

    labels: Tensor
    excluded: Tensor | None
    own: Tensor | None
    mirrored: bool

    def exclude(self, z: Tensor, rows: slice, columns: slice, value: float) -> None:
        """Set what takes no part."""
        if self.excluded is not None:
            z.masked_fill_(self.excluded[rows, columns], value)
        if self.own is not None:
            put(z, self.own[rows] - columns.start, value)

    def uncounted(self, columns: int) -> Tensor:
        """Return which rows have no positive here, or one that is excluded from the sums."""
        if not columns:
            return torch.ones_like(self.labels, dtype=torch.bool)
        place = self.labels.clamp(0, columns - 1)
        found = place != self.labels
        if self.excluded is not None:
            found |= self.excluded.gather(1, place[:, None])[:, 0]
        return found if self.own is None else found | (self.own == self.labels)


def spans(size: int, step: int) -> Iterator[slice]:
    """Cut range(size) into pieces of at most ``step``."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def tiles(x: Tensor, y: Tensor, mirrored: bool = False) -> Iterator[tuple[slice, slice, bool]]:
    """Yield rows, columns, and whether the tile holds the diagonal of a mirrored matrix."""
    side = _side(x)
    for rows in spans(len(x), side):
        for columns in spans(len(y), side):
            if not mirrored or columns.start >= rows.start:
                yield rows, columns, mirrored and columns.start == rows.start


def memory_for_tile(x: Tensor, y: Tensor) -> Tensor:
    """Return what the logits of any tile fit into."""
    return x.new_empty(min(len(x), _side(x)) * min(len(y), _side(x)))


def product(x: Tensor, y: Tensor, scale: Tensor, memory: Tensor) -> Tensor:
    """Return s x yᵀ in that memory."""
    # Scaled last, as products of bfloat16 numbers are exact: the alpha of a BLAS comes first.
    z = memory[: len(x) * len(y)].view(len(x), len(y))
    return torch.mm(x, y.T, out=z).mul_(scale)


def pick(z: Tensor, index: Tensor) -> Tensor:
    """Return z_i,index(i) in float64, 0 where the index is not in the tile."""
    found = z.gather(1, index.clamp(0, z.shape[1] - 1)[:, None])[:, 0].double()
    return torch.where(_within(z, index), found, 0.0)


def put(z: Tensor, index: Tensor, values: Tensor | float) -> None:
    """Set z_i,index(i) where the index is in the tile."""
    place = index.clamp(0, z.shape[1] - 1)[:, None]
    new = torch.as_tensor(values, dtype=z.dtype, device=z.device).view(-1, 1)
    z.scatter_(1, place, torch.where(_within(z, index)[:, None], new, z.gather(1, place)))


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Return Σ x_ik y_ik in float64."""
    parts = [(x[i] * y[i]).sum(dtype=torch.float64) for i in spans(len(x), _side(x))]
    return torch.stack(parts).sum() if parts else x.new_zeros((), dtype=torch.float64)


def _side(x: Tensor) -> int:
    if x.device.type != "cpu":
        return OTHER_TILE
    return CPU_TILE if torch.get_num_threads() == 1 else THREADS_TILE


def _within(z: Tensor, index: Tensor) -> Tensor:
    return (index >= 0) & (index < z.shape[1])


def _are_small(x: Tensor, y: Tensor, scale: Tensor) -> bool:
    """Whether no logit can be large: asked on the CPU only, others would have to be waited for."""
    if x.device.type != "cpu" or not len(x) or not len(y):
        return False
    longest = [torch.linalg.vector_norm(v, dim=1).max().item() for v in (x, y)]
    return abs(scale.item()) * math.prod(longest) <= _SMALL


def sums(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps of rows and columns of s x yᵀ, and the positives' logits, in float64."""
    memory, spare, small = memory_for_tile(x, y), memory_for_tile(x, y), _are_small(x, y, scale)
    rows = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    lower = rows if pairs.mirrored else rows.new_full((len(y) if columns else 0,), -math.inf)
    positives, nothing = torch.zeros_like(rows), 0.0 if small else -math.inf
    for i, j, diagonal in tiles(x, y, pairs.mirrored):
        z = product(x[i], y[j], scale, memory)
        index = pairs.labels[i] - j.start
        found = pick(z, index)
        positives[i] += found
        if pairs.mirrored and not diagonal:
            positives.index_add_(0, pairs.labels[i], found)
        z = z.exp_() if small else z
        pairs.exclude(z, i, j, nothing)
        put(z, index, nothing)
        if (columns or pairs.mirrored) and not diagonal:
            place = spare[: z.numel()].view_as(z)
            lower[j] = torch.logaddexp(lower[j], _sum(z, 0, None if small else place))
        rows[i] = torch.logaddexp(rows[i], _sum(z, 1, None if small else z))
    if pairs.mirrored:
        return torch.logaddexp(rows, positives), lower.new_empty(0), positives
    counted = positives.masked_fill(pairs.uncounted(len(y)), -math.inf)
    return torch.logaddexp(rows, counted), _joined(lower, pairs.labels, counted), positives


def _sum(z: Tensor, dim: int, out: Tensor | None) -> Tensor:
    """Return the logarithm of the sum of z, or where there is memory of that of exp z."""
    if out is None:
        return z.sum(dim).double().log_()
    highest = z.amax(dim, keepdim=True)
    near = highest.clamp(min=_LOWEST)
    total = torch.sub(z, near, out=out).clamp_(min=_LOWEST_EXPONENT).exp_().sum(dim, keepdim=True)
    return total.double().log_().add_(highest).squeeze(dim)


def _joined(sums: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Return the log-sum-exp of each column and its positives, of which there may be several."""
    if not len(sums):
        return sums
    place = labels.clamp(0, len(sums) - 1)
    highest = sums.scatter_reduce(0, place, counted, "amax").clamp_(min=_LOWEST)
    total = (sums - highest).exp_().index_add_(0, place, (counted - highest[place]).exp_())
    return total.log_().add_(highest)


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pairs: Pairs,
    sides: Sequence[tuple[Tensor, Tensor]],
    grad_positives: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return G y and Gᵀ x, G as in ``block_logsumexp_grads``, or (G + Gᵀ) x twice if mirrored.

    ``sides`` has sums and gradients of rows, and of columns where they count.
    """
    memory, spare, small = memory_for_tile(x, y), memory_for_tile(x, y), _are_small(x, y, scale)
    dx = torch.zeros_like(x)
    dy = dx if pairs.mirrored else torch.zeros_like(y)
    place, uncounted = pairs.labels.clamp(0, len(y) - 1), pairs.uncounted(len(y))
    for i, j, diagonal in tiles(x, y, pairs.mirrored):
        z = product(x[i], y[j], scale, memory)
        index = pairs.labels[i] - j.start
        at = pick(z, index).masked_fill_(uncounted[i], -math.inf)
        here = sides[:1] if diagonal else sides
        grads = grad_positives[i] + _weight_of_positives(at, here, i, place[i])
        if pairs.mirrored and not diagonal:
            grads += grad_positives[place[i]]
        each = [(total[k], weight[k]) for (total, weight), k in zip(here, (i, j), strict=False)]
        (_weigh_small if small else _weigh)(z, each, spare[: z.numel()].view_as(z))
        pairs.exclude(z, i, j, 0.0)
        put(z, index, grads)
        dx[i].addmm_(z, y[j])
        dy[j].addmm_(z.T, x[i])
    return dx, dy


def _weight_of_positives(
    z: Tensor, sides: Sequence[tuple[Tensor, Tensor]], rows: slice, columns: Tensor
) -> Tensor:
    (total, weight), *others = sides
    found = _weight(z, total[rows], weight[rows])
    for total, weight in others:
        found += _weight(z, total[columns], weight[columns])
    return found


def _weight(z: Tensor | float, total: Tensor, weight: Tensor) -> Tensor:
    """Return weight · exp(z − total), 0 where the total is that of nothing."""
    return ((z - total).exp_() * weight).masked_fill_(total == -math.inf, 0.0)


def _weigh_small(z: Tensor, sides: list[tuple[Tensor, Tensor]], spare: Tensor) -> None:
    """Make of z the sum of weight · exp(z − total) over rows and columns."""
    a, *b = (_weight(0.0, total, weight).to(z.dtype) for total, weight in sides)
    z.exp_().mul_(torch.add(a[:, None], b[0], out=spare) if b else a[:, None])


def _weigh(z: Tensor, sides: list[tuple[Tensor, Tensor]], spare: Tensor) -> None:
    """Do the same for logits of any size."""
    factors = []
    for dim, (total, weight) in reversed(list(enumerate(sides))):
        near = total.clamp(min=_LOWEST).to(z.dtype)
        shares = torch.sub(z, near.unsqueeze(1 - dim), out=spare if dim else z)
        shares.clamp_(min=_LOWEST_EXPONENT).exp_()
        # What rounding takes off the total goes into the factor.
        factors.append(_weight(near.double(), total, weight).to(z.dtype).unsqueeze(1 - dim))
    z.mul_(factors[-1])
    if len(factors) == 2:
        z.addcmul_(spare, factors[0])
