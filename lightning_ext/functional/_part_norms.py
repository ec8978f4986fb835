"""Squared norms of gradients, whole or by group, for one batch or for its parts.

Source: McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1), the statistics that the gradient
    noise scale is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ext.functional._widen import widen_real

_LARGE = 2**16  # entries of which torch's norm on a CPU adds up too many one after another


def sq_norms(
    tensors: Sequence[Tensor | None],
    groups: Sequence[int] | None = None,
    *,
    foreach: bool = False,
) -> Tensor:
    """Return Σ x² over all entries of the tensors, in one number or by group.

    The sum is taken in ``torch.promote_types(x.dtype, torch.float32)`` and can be differentiated
    everywhere, also at 0.

    Args:
        tensors: tensors of any shapes on one device; ``None`` counts as zeros.
        groups: the group of each tensor, integers of at least 0; one group without it.
        foreach: take the tensors together, several times faster where they are many and small;
            neither for gradients nor for ``torch.vmap``.

    Returns:
        Shape ``()``, or ``(max(groups) + 1,)`` with groups.

    Raises:
        ValueError: if ``groups`` does not give one group of at least 0 for each tensor.

    Example:
        >>> sq_norms([torch.tensor([3.0, 4.0]), None, torch.tensor(2.0)], groups=[0, 0, 1])
        tensor([25.,  4.])
    """
    members = [0] * len(tensors) if groups is None else list(groups)
    if len(members) != len(tensors) or any(group < 0 for group in members):
        raise ValueError(
            f"groups={members} does not fit {len(tensors)} tensors; give each tensor, None "
            "included, one group of at least 0"
        )
    first = next((x for x in tensors if x is not None), None)
    device = None if first is None else first.device
    zero = torch.zeros((), dtype=torch.float32, device=device)
    sums = [zero] * (1 if groups is None else max(members, default=-1) + 1)
    if foreach:
        _together(tensors, members, sums)
    else:
        for x, group in zip(tensors, members, strict=True):
            if x is not None:
                sums[group] = sums[group] + _sq_norm(x)
    if groups is None:
        return sums[0]
    return torch.stack(sums) if sums else zero.new_zeros(0)


def part_sq_norms(
    part_gradients: Sequence[Sequence[Tensor | None]], groups: Sequence[int] | None = None
) -> Tensor:
    """Return |g_j|² for every part j of a batch.

    Args:
        part_gradients: for each of the k parts its gradient, one tensor per parameter.
        groups: the group of each parameter, as in ``sq_norms``; the same for all parts.

    Returns:
        Shape ``(k,)``, or ``(k, max(groups) + 1)`` with groups.

    Raises:
        ValueError: if there are no parts, or the groups do not fit a part.

    Example:
        >>> part_sq_norms([[torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])]])
        tensor([25.,  1.])
    """
    if not part_gradients:
        raise ValueError("part_gradients is empty; give the gradients of at least one part")
    return torch.stack([sq_norms(part, groups) for part in part_gradients])


def _sq_norm(x: Tensor) -> Tensor:
    return widen_real(x).square().sum()


@torch.no_grad()
def _together(tensors: Sequence[Tensor | None], groups: list[int], sums: list[Tensor]) -> None:
    """Adds the squares of each group to its sum."""
    alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for x, group in zip(tensors, groups, strict=True):
        if x is None:
            continue
        if x.numel() > _LARGE and x.device.type == "cpu":
            flat = widen_real(x).flatten()
            sums[group] = sums[group] + torch.dot(flat, flat)
        else:
            alike.setdefault((group, x.dtype), []).append(x)
    for (group, dtype), found in alike.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(found, 2, wide))
        sums[group] = sums[group] + torch.dot(norms, norms)
