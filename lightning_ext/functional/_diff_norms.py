"""Squared norms of differences, and of a gradient that was added to another one.

Source: McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1), the statistics of a small and a
    big batch.
Differs: the small batch is the last one that was added, found as what the sum has changed by; with
    it comes the product of old and new, which sums up over the parts to (|G|² − Σ|g_j|²)/2 without
    the cancellation of that difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_ext.functional._part_norms import check_groups, dots, sum_by_group
from lightning_ext.functional._widen import widen_real

Tensors = Sequence[Tensor | None]
_RUN = 2**16  # entries
_READY = (torch.float32, torch.float64)


def diff_sq_norms(
    tensors: Tensors,
    others: Tensors,
    groups: Sequence[int] | None = None,
    *,
    foreach: bool = False,
) -> Tensor:
    """Return Σ (x − y)² over all entries of the tensors, in one number or by group.

    Taken in the wider of both dtypes, float32 at least.

    Args:
        tensors: x; ``None`` counts as zeros.
        others: y, for each tensor one of its shape, or ``None``.
        groups: the group of each pair, as in ``sq_norms``.
        foreach: with fewer intermediate results; neither for gradients nor for ``torch.vmap``.

    Returns:
        Shape ``()``, or ``(max(groups) + 1,)`` with groups.

    Raises:
        ValueError: if the lists or the groups do not fit.

    Example:
        >>> diff_sq_norms([torch.tensor([3.0, 4.0]), None], [torch.zeros(2), torch.ones(1)], [0, 1])
        tensor([25.,  1.])
    """
    check_pairs(tensors, others)
    if foreach:
        return _together(tensors, others, groups, only_change=True)
    pairs = _pairs(tensors, others)
    terms = [None if pair is None else (pair[0] - pair[1]).square().sum() for pair in pairs]
    return sum_by_group(terms, groups, torch.zeros((), dtype=torch.float32))


def accumulated_sq_norms(
    accumulated: Tensors,
    before: Tensors,
    groups: Sequence[int] | None = None,
    *,
    foreach: bool = False,
) -> Tensor:
    """Return what a sum G of gradients tells of the part g = G − G' that was added last:

        |g|²,  |G|²,  ⟨g, G'⟩

    The parts' products add up to Σ_j ⟨g_j, G_{j−1}⟩ = (|G|² − Σ_j |g_j|²)/2, which is 0 on average
    where the gradients are nothing but noise. Where G is kept in half precision, g is mostly
    rounding.

    Args:
        accumulated: G, one tensor for each parameter; ``None`` counts as zeros.
        before: G', for each tensor one of its shape, or ``None``.
        groups: the group of each parameter, as in ``sq_norms``.
        foreach: with fewer intermediate results; neither for gradients nor for ``torch.vmap``.

    Returns:
        Shape ``(3,)``, or ``(3, max(groups) + 1)`` with groups.

    Raises:
        ValueError: if the lists or the groups do not fit.

    Example:
        >>> accumulated_sq_norms([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 1.0])])
        tensor([ 9., 25.,  3.])
    """  # noqa: D415
    check_pairs(accumulated, before)
    if foreach:
        return _together(accumulated, before, groups, only_change=False)
    terms = [None if pair is None else _sums(*pair) for pair in _pairs(accumulated, before)]
    return sum_by_group(terms, groups, torch.zeros(3, dtype=torch.float32))


@torch.no_grad()
def accumulated_sq_norms_(
    accumulated: Tensors, before: Sequence[Tensor | None], groups: Sequence[int] | None = None
) -> Tensor:
    """Return ``accumulated_sq_norms`` and copy what has been accumulated to ``before``.

    Args:
        accumulated: as there.
        before: as there, in a dtype that can hold what is accumulated; ``None`` only where there is
            nothing accumulated.
        groups: as there.

    Returns:
        As there.

    Raises:
        ValueError: as there, or if a tensor of ``before`` is missing or too narrow.

    Example:
        >>> before = [torch.zeros(2)]
        >>> accumulated_sq_norms_([torch.tensor([3.0, 4.0])], before), before
        (tensor([25., 25.,  0.]), [tensor([3., 4.])])
    """
    check_copies(accumulated, before)
    found = accumulated_sq_norms(accumulated, before, groups, foreach=True)
    for x, y in zip(accumulated, before, strict=True):
        if y is not None:
            y.zero_() if x is None else y.copy_(x)
    return found


def check_pairs(tensors: Tensors, others: Tensors) -> None:
    """Check that two lists have tensors of the same shapes.

    Raises:
        ValueError: if they have not.
    """
    if len(tensors) != len(others):
        raise ValueError(f"{len(tensors)} and {len(others)} tensors were given; give them in pairs")
    for i, (x, y) in enumerate(zip(tensors, others, strict=True)):
        if x is not None and y is not None and (x.shape != y.shape or x.device != y.device):
            raise ValueError(
                f"pair {i} has shape {tuple(x.shape)} on {x.device} and {tuple(y.shape)} on "
                f"{y.device}; they must agree"
            )


def check_copies(accumulated: Tensors, before: Tensors) -> None:
    """Check that what is accumulated can be copied.

    Raises:
        ValueError: if there is nowhere to copy to, or digits would be lost.
    """
    check_pairs(accumulated, before)
    for i, (x, y) in enumerate(zip(accumulated, before, strict=True)):
        if x is None:
            continue
        if y is None:
            raise ValueError(f"before[{i}] is None, accumulated[{i}] is not; give it zeros")
        if torch.promote_types(x.dtype, y.dtype) != y.dtype:
            raise ValueError(f"before[{i}] is {y.dtype}, too narrow for {x.dtype}")


def _pairs(tensors: Tensors, others: Tensors) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Pairs of one real dtype, with zeros for what is missing; ``None`` where both are."""
    for x, y in zip(tensors, others, strict=True):
        if x is None and y is None:
            yield None
            continue
        if x is not None and y is not None and x.dtype is y.dtype and x.dtype in _READY:
            yield x, y
            continue
        if x is None or y is None:
            there = x if x is not None else y
            assert there is not None
            x, y = (torch.zeros_like(there) if each is None else each for each in (x, y))
        wide = torch.promote_types(x.dtype, y.dtype)
        yield widen_real(x.to(wide)), widen_real(y.to(wide))


def _sums(x: Tensor, y: Tensor) -> Tensor:
    change = x - y
    return torch.stack([change.square().sum(), x.square().sum(), (change * y).sum()])


@torch.no_grad()
def _together(
    tensors: Tensors, others: Tensors, groups: Sequence[int] | None, *, only_change: bool
) -> Tensor:
    """The same in runs that stay in a cache."""
    members = check_groups(tensors, groups)
    count = 1 if groups is None else max([-1, *members]) + 1
    rows: list[list[Tensor]] = [[] for _ in range(1 if only_change else 3)]
    where: list[int] = []
    for group, x, y in _runs(tensors, others, members):
        change = x - y
        terms = [dots(change, change)]
        if not only_change:
            terms += [dots(x, x), dots(change, y)]
        for row, found in zip(rows, terms, strict=True):
            row += found
        where += [group] * len(terms[0])
    if where:
        flat = torch.stack([torch.stack(row) for row in rows], dim=1)
        index = torch.tensor(where, device=flat.device)
        sums = flat.new_zeros(count, len(rows)).index_put_((index,), flat, accumulate=True).T
    else:
        sums = torch.zeros(len(rows), count, dtype=torch.float32)
    sums = sums if groups is not None else sums[:, 0]
    return sums[0] if only_change else sums


def _runs(
    tensors: Tensors, others: Tensors, members: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Consecutive pairs of one group and dtype as one flat pair, of few entries or of one pair."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    entries = 0
    last: tuple[int, torch.dtype] | None = None
    for pair, group in zip(_pairs(tensors, others), members, strict=True):
        if pair is None:
            continue
        x, y = pair
        if last is not None and (entries + x.numel() > _RUN or (group, x.dtype) != last):
            yield last[0], _flat(xs), _flat(ys)
            xs, ys, entries = [], [], 0
        xs.append(x)
        ys.append(y)
        entries, last = entries + x.numel(), (group, x.dtype)
    if last is not None:
        yield last[0], _flat(xs), _flat(ys)


def _flat(tensors: list[Tensor]) -> Tensor:
    flat = [x.flatten() for x in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
