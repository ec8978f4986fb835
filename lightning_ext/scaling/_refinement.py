"""A learning-rate schedule made from the gradient norms of an earlier run.

Source: Defazio et al. 2023, arXiv:2310.07831, section 3 (schedule refinement).
Differs: the filter's window is odd; positions count samples, so that the result can be stretched to
    another length and used while the batch changes.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_ext.scaling._validate import (
    require_fraction,
    require_non_negative,
    require_positive,
)

_POWERS = {"l2": 2, "l1": 1}


def refined_factors(
    grad_norms: Sequence[float], *, width: float = 0.1, norm: str = "l2"
) -> list[float]:
    """Return the factors that the gradient norms of a run suggest for a run like it.

    With norms smoothed by a median, a step's weight is ``w = 1/G²`` for SGD (L2 norm) and ``1/G``
    for Adam and its kin (L1 norm); its factor is ``w_t · Σ_{s>t} w_s``, over the largest. Equal
    norms give the straight line from 1 at the first step to 0 at the last.

    Args:
        grad_norms: the norm of every step in turn, before clipping, at a constant batch; shape (T,)
            with T of at least 2.
        width: of the median's window as a share of T, in [0, 1]; the window reflects at the end and
            repeats the first norm before the begin. 0 smooths nothing.
        norm: which norm it is, ``"l2"`` or ``"l1"``.

    Returns:
        T factors, the largest 1, the last 0.

    Raises:
        TypeError: if a norm is not a number.
        ValueError: if there are fewer than two, one is negative or not finite, the smoothed norm
            is 0 somewhere, or ``norm`` is not known.

    Example:
        >>> refined_factors([3.0, 3.0, 3.0, 3.0, 3.0])
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if norm not in _POWERS:
        raise ValueError(f"norm={norm!r} is not known; choose one of {tuple(_POWERS)}")
    require_fraction("width", width)
    if len(grad_norms) < 2:
        raise ValueError(f"{len(grad_norms)} gradient norms were given; refining needs two")
    for value in grad_norms:
        require_non_negative("gradient norm", value)
    smooth = _median_filtered(grad_norms, int(width * len(grad_norms) / 2))
    least = min(smooth)
    if least == 0:
        raise ValueError(
            "the smoothed gradient norm is 0 somewhere, and its inverse no number; leave out the "
            "part of the run in which nothing was learned"
        )
    weights = [(least / value) ** _POWERS[norm] for value in smooth]
    rest, products = 0.0, []
    for weight in reversed(weights):
        products.append(weight * rest)
        rest += weight
    largest = max(products)
    return [product / largest for product in reversed(products)]


@dataclass(frozen=True)
class FactorTable:
    """Factors of the peak learning rate at given positions, straight lines between them.

    Args:
        samples: positions, strictly increasing, at least 0.
        factors: the factor at each of them, at least 0.
        global_batch: the batch at which they were found, for the reader's information.

    Raises:
        TypeError: if an entry is not a number.
        ValueError: if there are none, not equally many, or they are out of range or order.

    Example:
        >>> FactorTable((0, 100), (1.0, 0.0)).at(150, total_samples=200)
        0.25
    """

    samples: tuple[float, ...]
    factors: tuple[float, ...]
    global_batch: int | None = None

    def __post_init__(self) -> None:
        """Check the entries."""
        if not self.samples or len(self.samples) != len(self.factors):
            raise ValueError(
                f"{len(self.samples)} positions and {len(self.factors)} factors were given; a "
                "table has at least one entry, each with both"
            )
        for position, factor in zip(self.samples, self.factors, strict=True):
            require_non_negative("position", position)
            require_non_negative("factor", factor)
        for before, after in pairwise(self.samples):
            if before >= after:
                raise ValueError(
                    f"position {after} follows {before}; positions must strictly increase"
                )

    def at(self, samples: float, *, total_samples: float | None = None) -> float:
        """Return the factor at a position; before the first and after the last they stay.

        Args:
            samples: samples seen, at least 0.
            total_samples: where the last entry lies, by stretching the table; ``None`` leaves it.

        Raises:
            TypeError: if an argument is not a number.
            ValueError: if it is out of range.
        """
        require_non_negative("samples", samples)
        if total_samples is not None:
            require_positive("total_samples", total_samples)
            samples = self.samples[-1] * (samples / total_samples)
        after = bisect_right(self.samples, samples)
        if after == 0 or after == len(self.samples):
            return self.factors[min(after, len(self.samples) - 1)]
        left, right = self.samples[after - 1], self.samples[after]
        low, high = self.factors[after - 1], self.factors[after]
        return low + (high - low) * ((samples - left) / (right - left))

    def to_json(self) -> str:
        """Return the text that ``from_json`` reads back."""
        entries = {"samples": self.samples, "factors": self.factors}
        return json.dumps({"global_batch": self.global_batch, **entries})

    @classmethod
    def from_json(cls, text: str) -> FactorTable:
        """Read a table from text.

        Raises:
            ValueError: if the text is no table.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not {"samples", "factors"} <= found.keys():
            raise ValueError(
                "the text is no table of factors; it holds 'samples' and 'factors', two lists "
                "of equal length, as FactorTable.to_json writes them"
            )
        samples, factors = tuple(found["samples"]), tuple(found["factors"])
        return cls(samples, factors, found.get("global_batch"))


def _median_filtered(values: Sequence[float], half: int) -> list[float]:
    """Return the median of the 2·half + 1 values around each: repeated before, reflected after."""
    if half == 0:
        return [float(value) for value in values]
    padded = [values[0]] * half + [*values, *reversed(values[-half:])]
    window = sorted(padded[: 2 * half + 1])
    found = [window[half]]
    for index in range(len(values) - 1):
        del window[bisect_left(window, padded[index])]
        insort(window, padded[index + 2 * half + 1])
        found.append(window[half])
    return [float(value) for value in found]
