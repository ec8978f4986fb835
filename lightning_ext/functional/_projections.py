"""Inner products of the parts of a batch with the whole, the statistics of inner-product tests.

Source: Bollapragada et al. 2018 (arXiv:1710.11258, section 2), over all parameters at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ext.functional._widen import widen_real


def inner_products(
    part_gradients: Sequence[Sequence[Tensor | None]], whole_gradient: Sequence[Tensor | None]
) -> Tensor:
    """Return ⟨g_j, ḡ⟩ for every part j of a batch, Σ over all entries of all parameters.

    The sum is taken in ``torch.promote_types(x.dtype, torch.float32)``.

    Args:
        part_gradients: for each of the k parts its gradient, one tensor per parameter; ``None``
            counts as zeros.
        whole_gradient: ḡ, one tensor of the same shape per parameter, or ``None``.

    Returns:
        Shape ``(k,)``.

    Raises:
        ValueError: if there are no parts, or a part has another number of parameters.

    Example:
        >>> parts = [[torch.tensor([3.0, 4.0]), None], [torch.tensor([1.0, 0.0]), torch.ones(1)]]
        >>> inner_products(parts, [torch.tensor([2.0, 2.0]), torch.tensor([0.5])])
        tensor([14.0000,  2.5000])
    """
    if not part_gradients:
        raise ValueError("part_gradients is empty; give the gradients of at least one part")
    for part in part_gradients:
        if len(part) != len(whole_gradient):
            raise ValueError(
                f"a part has {len(part)} tensors and the whole {len(whole_gradient)}; give one for "
                "each parameter, None included"
            )
    return torch.stack([_inner_product(part, whole_gradient) for part in part_gradients])


def _inner_product(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> Tensor:
    first = next((x for x in (*one, *other) if x is not None), None)
    device = None if first is None else first.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    for x, y in zip(one, other, strict=True):
        if x is not None and y is not None:
            total = total + (widen_real(x) * widen_real(y)).sum()
    return total
