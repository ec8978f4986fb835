"""How the gradients of samples lie relative to that of their batch: statistics and averages.

Source: Bollapragada et al. 2018 (arXiv:1710.11258, section 2).
Differs: from the parts of a batch, of any sizes; numerator and denominators of the tests are
    averaged over steps before they are divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import mul
from typing import TYPE_CHECKING

from lightning_ext.scaling._batch_rule import InnerProducts
from lightning_ext.scaling._noise import age_weights, noise_statistics

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def inner_product_variance(projections: Iterable[float], part_sizes: Iterable[float]) -> float:
    """Estimate the variance over samples of ⟨g_i, ḡ⟩ from the parts of one batch.

    It is the S of ``noise_statistics`` for the numbers p_j = ⟨g_j, ḡ⟩. Their mean over samples is
    |ḡ|², so that

        variance = (Σ n_j p_j² − n |ḡ|⁴) / (k − 1) = Σ n_j (p_j − |ḡ|²)² / (k − 1)

    Args:
        projections: p_j of the k parts, k at least 2.
        part_sizes: n_j in samples, each above 0.

    Returns:
        The variance, per sample.

    Raises:
        ValueError: as ``noise_statistics``.

    Example:
        >>> inner_product_variance([3.0, 1.0], [1, 1])
        2.0
    """
    values, sizes = list(projections), list(part_sizes)
    mean = sum(map(mul, values, sizes)) / (sum(sizes) or 1)
    centred = [(p - mean) ** 2 for p in values]
    return noise_statistics(centred, sizes, whole_sq_norm=0.0)[1]


def mean_inner_products(
    history: Sequence[InnerProducts] | npt.NDArray[np.float64], *, smoothing: float = 1.0
) -> InnerProducts:
    """Average each number over measurements, weighted with smoothing^age.

    Args:
        history: measurements, oldest first, at least one; an array of shape ``(n, 4)`` has them in
            its rows.
        smoothing: weight of a measurement relative to the next newer one, in (0, 1].

    Returns:
        The averages.

    Raises:
        ValueError: if the history is empty or misshapen, or ``smoothing`` is out of range.

    Example:
        >>> mean_inner_products([(1.0, 1.0, 1.0, 4.0), (3.0, 2.0, 4.0, 8.0)])
        InnerProducts(variance=2.0, batch_sq_norm=1.5, batch_quad_norm=2.5, grad_trace=6.0)
    """
    import numpy as np

    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing={smoothing!r} is not allowed; it must lie in (0, 1]")
    rows = np.asarray(history, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 4 or not len(rows):
        raise ValueError(f"history has shape {rows.shape}; give rows of the 4 numbers")
    return InnerProducts(*(age_weights(len(rows), smoothing) @ rows).tolist())
