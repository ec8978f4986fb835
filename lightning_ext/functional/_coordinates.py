"""Variance of every coordinate of the gradient over samples, and what it is next to the mean.

Source: Lau et al. 2024 (AdAdaGrad, arXiv:2402.11215, the coordinate-wise norm test).
Differs: from the parts of a batch, of any sizes; the variance is pooled over them all, because a
    mean of the ranks' unbiased variances plus the variance between ranks counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ext.functional._widen import widen


def coordinate_sums(
    part_gradients: Sequence[Sequence[Tensor]], part_sizes: Sequence[float]
) -> list[Tensor]:
    """Return Σ_j n_j g_j² for every coordinate; the sums of parts of a batch may be added up.

    Taken in ``torch.promote_types(x.dtype, torch.float32)``.

    Args:
        part_gradients: for each of the k parts its mean gradient, one real tensor per parameter.
        part_sizes: n_j in samples.

    Returns:
        One tensor per parameter, of its shape.

    Raises:
        ValueError: if there are no parts, or the lengths differ.

    Example:
        >>> coordinate_sums([[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]], [1, 2])
        [tensor([19.,  4.])]
    """
    if not part_gradients or len(part_gradients) != len(part_sizes):
        raise ValueError(
            f"{len(part_gradients)} part_gradients and {len(part_sizes)} part_sizes were given; "
            "give at least one part and one size for each"
        )
    sums = [widen(x).square() * part_sizes[0] for x in part_gradients[0]]
    for part, size in zip(part_gradients[1:], part_sizes[1:], strict=True):
        sums = [total + widen(x).square() * size for total, x in zip(sums, part, strict=True)]
    return sums


def coordinate_variance(
    sums: Sequence[Tensor], whole_gradient: Sequence[Tensor], samples: float, parts: int
) -> list[Tensor]:
    """Return the variance over samples of every coordinate c of the gradient, without bias:

        var_c = (Σ_j n_j g_jc² − n ḡ_c²) / (k − 1)

    Its sum over all coordinates is S of ``scaling.noise_statistics``.

    Args:
        sums: what ``coordinate_sums`` returns, added up over all parts.
        whole_gradient: ḡ = Σ n_j g_j / n, one real tensor per parameter.
        samples: n = Σ n_j.
        parts: k, at least 2.

    Returns:
        One tensor per parameter, of its shape.

    Raises:
        ValueError: if there are fewer than 2 parts.

    Example:
        >>> coordinate_variance([torch.tensor([10.0, 8.0])], [torch.tensor([2.0, 2.0])], 2, 2)
        [tensor([2., 0.])]
    """  # noqa: D415
    if parts < 2:
        raise ValueError(f"parts={parts}; at least 2 are needed for a variance")
    return [
        (total - widen(mean).square() * samples) / (parts - 1)
        for total, mean in zip(sums, whole_gradient, strict=True)
    ]


def coordinate_quantiles(
    variances: Sequence[Tensor], whole_gradient: Sequence[Tensor], fractions: Sequence[float]
) -> Tensor:
    """Return how far var_c/ḡ_c² reaches: that fraction of the coordinates is at most there.

    A coordinate whose variance and mean are both 0 is left out; where only the mean is 0 the ratio
    is infinite. A variance below 0 is what rounding left of 0.

    Args:
        variances: what ``coordinate_variance`` returns.
        whole_gradient: ḡ, one real tensor per parameter.
        fractions: of the coordinates, each in (0, 1].

    Returns:
        Shape ``(len(fractions),)``: ratios of coordinates, without interpolation; nan where no
        coordinate is left.

    Raises:
        ValueError: if a fraction is out of range.

    Example:
        >>> variances, mean = [torch.tensor([8.0, 0.0, 1.0, 3.0])], [torch.tensor([2.0, 0, 1, 1])]
        >>> coordinate_quantiles(variances, mean, [0.5, 1.0])
        tensor([2., 3.])
    """
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions={list(fractions)} are not allowed; each must lie in (0, 1]")
    variance = torch.cat([x.flatten() for x in variances]).clamp_min(0)
    square = torch.cat([widen(x).flatten() for x in whole_gradient]).square()
    kept = (variance > 0) | (square > 0)
    ratios = variance[kept] / square[kept]
    if not len(ratios):
        return variance.new_full((len(fractions),), math.nan)
    # One part in 1e9 of slack: 0.9 of 10 coordinates are 9 also where 0.9 · 10 rounds up.
    ranks = [math.ceil(fraction * len(ratios) * (1 - 1e-9)) for fraction in fractions]
    if ratios.device.type == "cpu":  # elsewhere torch has no deterministic way to select
        return torch.stack([ratios.kthvalue(rank).values for rank in ranks])
    ratios = ratios.sort().values
    return torch.stack([ratios[rank - 1] for rank in ranks])
