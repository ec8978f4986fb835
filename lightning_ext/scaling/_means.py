"""Weights that turn a mean over parts into a mean over samples.

Source: derived. A Trainer averages the mean losses of K·W parts with equal weight; the mean over
    all n samples weighs part j by n_j / n.
"""

from __future__ import annotations

from lightning_ext.scaling._validate import require_count


def loss_weight(part_samples: int, total_samples: int, *, parts: int) -> float:
    """Return the factor of one part's mean loss: n_j·parts / n.

    With it, the plain average over ``parts`` mean losses is the mean over all n samples. It is
    exactly 1 where all parts have one size.

    Args:
        part_samples: n_j, samples of the part; 0 for a part that is not to count.
        total_samples: n, samples of all parts.
        parts: number of parts that the average divides by, whether all of them exist or not.

    Returns:
        The factor, at least 0.

    Raises:
        TypeError: if a value is not an integer.
        ValueError: if ``total_samples`` or ``parts`` is below 1, or ``part_samples`` below 0.

    Example:
        >>> [loss_weight(n, 12, parts=2) for n in (8, 4)]
        [1.3333333333333333, 0.6666666666666666]
    """
    require_count("total_samples", total_samples)
    require_count("parts", parts)
    if part_samples:
        require_count("part_samples", part_samples)
    return part_samples * parts / total_samples
