"""Squared norms over lists of tensors in one launch and a small one that adds up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional._diff_norms import check_copies, check_pairs
from lightning_ext.functional._part_norms import check_groups
from lightning_ext.kernels._fused import use_triton
from lightning_ext.kernels._recomputed_gradient import with_gradient

Tensors = Sequence[Tensor | None]


def sq_norms(
    tensors: Tensors, groups: Sequence[int] | None = None, *, fused: bool | None = None
) -> Tensor:
    """Return Σ x² over all entries of the tensors, in one number or by group.

    The kernel sums up in float32 by chunks and adds these up in a fixed order: the result is the
    same at every call, and keeps its digits however many entries there are.

    Args:
        tensors: tensors of any shapes on one device; ``None`` counts as zeros.
        groups: the group of each tensor, integers of at least 0; ``range(len(tensors))`` for a norm
            of each; one group without it.
        fused: ``None``, the kernel on CUDA; ``True``, the kernel or an error; ``False``, torch.

    Returns:
        Shape ``()``, or ``(max(groups) + 1,)`` with groups.

    Raises:
        ValueError: if ``groups`` does not give one group of at least 0 for each tensor.

    Example:
        >>> sq_norms([torch.tensor([3.0, 4.0]), None, torch.tensor(2.0)], groups=[0, 0, 1])
        tensor([25.,  4.])
    """
    members = check_groups(tensors, groups)
    present = [x for x in tensors if x is not None]
    if not (present and _launches(fused, present, "sq_norms")):
        return functional.sq_norms(tensors, groups, foreach=_needs_no_gradient(present))
    from lightning_ext.kernels._triton import _sq_norms as triton

    count = max(members) + 1
    kept = [group for x, group in zip(tensors, members, strict=True) if x is not None]

    def launch(xs: Sequence[Tensor]) -> list[Tensor]:
        return [triton.sq_norms([xs], kept, count, triton.SQUARES)[0]]

    def formula(xs: Sequence[Tensor]) -> list[Tensor]:
        return [functional.sq_norms([*xs, None], [*kept, count - 1])]

    (found,) = with_gradient(launch, formula, present)
    return found if groups is not None else found[0]


def diff_sq_norms(
    tensors: Tensors,
    others: Tensors,
    groups: Sequence[int] | None = None,
    *,
    fused: bool | None = None,
) -> Tensor:
    """Return Σ (x − y)² over all entries of the tensors, in one number or by group.

    Args:
        tensors: x; ``None`` counts as zeros.
        others: y, for each tensor one of its shape, or ``None``.
        groups: the group of each pair, as in ``sq_norms``.
        fused: as in ``sq_norms``.

    Returns:
        Shape ``()``, or ``(max(groups) + 1,)`` with groups.

    Raises:
        ValueError: if the lists or the groups do not fit.

    Example:
        >>> diff_sq_norms([torch.tensor([3.0, 4.0]), None], [torch.zeros(2), torch.ones(1)], [0, 1])
        tensor([25.,  1.])
    """
    check_pairs(tensors, others)
    return _of_pairs(tensors, others, groups, fused, functional.diff_sq_norms)


def accumulated_sq_norms(
    accumulated: Tensors,
    before: Tensors,
    groups: Sequence[int] | None = None,
    *,
    fused: bool | None = None,
) -> Tensor:
    """Return what a sum G of gradients tells of the part g = G − G' that was added last:

        |g|²,  |G|²,  ⟨g, G'⟩

    in one pass over both. See ``functional.accumulated_sq_norms``.

    Args:
        accumulated: G, one tensor for each parameter; ``None`` counts as zeros.
        before: G', for each tensor one of its shape, or ``None``.
        groups: the group of each parameter, as in ``sq_norms``.
        fused: as in ``sq_norms``.

    Returns:
        Shape ``(3,)``, or ``(3, max(groups) + 1)`` with groups.

    Raises:
        ValueError: if the lists or the groups do not fit.

    Example:
        >>> accumulated_sq_norms([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 1.0])])
        tensor([ 9., 25.,  3.])
    """  # noqa: D415
    check_pairs(accumulated, before)
    return _of_pairs(accumulated, before, groups, fused, functional.accumulated_sq_norms)


@torch.no_grad()
def accumulated_sq_norms_(
    accumulated: Tensors,
    before: Tensors,
    groups: Sequence[int] | None = None,
    *,
    fused: bool | None = None,
) -> Tensor:
    """Return ``accumulated_sq_norms`` and copy what has been accumulated to ``before``, at once.

    Args:
        accumulated: as there.
        before: as there, in a dtype that can hold what is accumulated; ``None`` only where there is
            nothing accumulated.
        groups: as there.
        fused: as there.

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
    members = check_groups(accumulated, groups)
    xs, ys, kept = _present(accumulated, before, members)
    if not (xs and _launches(fused, [*xs, *ys], "accumulated_sq_norms_")):
        return functional.accumulated_sq_norms_(accumulated, before, groups)
    from lightning_ext.kernels._triton import _sq_norms as triton

    found = triton.sq_norms([xs, ys], kept, max(members) + 1, triton.ALL, write=True)
    return found if groups is not None else found[:, 0]


def _of_pairs(
    tensors: Tensors,
    others: Tensors,
    groups: Sequence[int] | None,
    fused: bool | None,
    plain: Callable[..., Tensor],
) -> Tensor:
    members = check_groups(tensors, groups)
    xs, ys, kept = _present(tensors, others, members)
    only_change = plain is functional.diff_sq_norms
    if not (xs and _launches(fused, [*xs, *ys], plain.__name__)):
        return plain(tensors, others, groups, foreach=_needs_no_gradient([*xs, *ys]))
    from lightning_ext.kernels._triton import _sq_norms as triton

    count, pairs = max(members) + 1, len(xs)
    what = triton.CHANGE if only_change else triton.ALL

    def launch(both: Sequence[Tensor]) -> list[Tensor]:
        return [triton.sq_norms([both[:pairs], both[pairs:]], kept, count, what)]

    def formula(both: Sequence[Tensor]) -> list[Tensor]:
        one, other = [*both[:pairs], None], [*both[pairs:], None]
        found = plain(one, other, [*kept, count - 1])
        return [found[None] if only_change else found]

    (found,) = with_gradient(launch, formula, [*xs, *ys])
    found = found[0] if only_change else found
    return found if groups is not None else found[..., 0]


def _present(
    tensors: Tensors, others: Tensors, members: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Pairs of which at least one is there, with zeros for the other, and their groups."""
    xs, ys, kept = [], [], []
    for x, y, group in zip(tensors, others, members, strict=True):
        there = x if x is not None else y
        if there is not None:
            xs.append(torch.zeros_like(there) if x is None else x)
            ys.append(torch.zeros_like(there) if y is None else y)
            kept.append(group)
    return xs, ys, kept


def _launches(fused: bool | None, tensors: list[Tensor], op: str) -> bool:
    # On a CPU a look at one of them is enough.
    return use_triton(fused, tensors[:1], op=op) and use_triton(fused, tensors, op=op)


def _needs_no_gradient(tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
