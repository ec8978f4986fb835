"""The largest size that passes a trial, found with few trials.

Source: Żelasko et al. 2024, arXiv:2409.13523 (EMMeTT), whose OOMptimizer doubles until memory runs
    out, then bisects to 5 %.
Differs: what is known before narrows the search, and what is found can narrow the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lightning_ext.scaling._validate import require_count, require_number


class Bracket(NamedTuple):
    """Two sizes between which the largest one lies that passes.

    Args:
        passed: the largest size known to pass, 0 where none is.
        failed: the smallest size known to fail, ``None`` where none is.

    Example:
        >>> Bracket(16, 32).next_size(start=1, largest=64)
        24
    """

    passed: int = 0
    failed: int | None = None

    def next_size(self, *, start: int, largest: int, tolerance: float = 0.05) -> int | None:
        """Return the size to try next, ``None`` where the answer is known well enough.

        It is ``start``, then twice what passed; once something failed, the middle, which is half
        while nothing passed. It ends where (failed − passed)/failed ≤ tolerance, where no size lies
        in between, or at ``largest``.
        """
        if self.passed >= largest or self._is_narrow(tolerance):
            return None
        if self.failed is None or self.failed > largest:
            return min(max(start, 2 * self.passed), largest)
        return (self.passed + self.failed) // 2

    def after(self, size: int, passed: bool) -> Bracket:
        """Return what is known once ``size`` has been tried."""
        return Bracket(size, self.failed) if passed else Bracket(self.passed, size)

    def _is_narrow(self, tolerance: float) -> bool:
        if self.failed is None:
            return False
        gap = self.failed - self.passed
        return gap <= 1 or (self.passed > 0 and gap <= tolerance * self.failed)


def largest_passing(
    trial: Callable[[int], bool],
    *,
    start: int = 1,
    largest: int,
    tolerance: float = 0.05,
    known: Bracket | None = None,
) -> Bracket:
    """Find the largest size that passes, to within ``tolerance``.

    It doubles from ``start`` until a size fails, or halves until one passes, then bisects until
    (failed − passed)/failed ≤ tolerance. No size is tried twice; there are at most about
    log₂(largest) + log₂(1/tolerance) + 2 trials.

    Args:
        trial: says whether a size passes; where one does, all smaller ones must.
        start: the first size to try.
        largest: the largest size of interest.
        tolerance: relative width of the bracket that is narrow enough; in [0, 1).
        known: what earlier trials found.

    Returns:
        The bracket. ``passed`` is the answer; 0 says that not even 1 passed. It may exceed
        ``largest`` where that was known before.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1, or the tolerance out of range.

    Example:
        >>> largest_passing(lambda size: size <= 100, start=8, largest=4096)
        Bracket(passed=100, failed=104)
    """
    require_count("start", start)
    require_count("largest", largest)
    require_number("tolerance", tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} is not allowed; it must be in [0, 1)")
    bracket = Bracket() if known is None else known
    while (
        size := bracket.next_size(start=start, largest=largest, tolerance=tolerance)
    ) is not None:
        bracket = bracket.after(size, trial(size))
    return bracket


def merge_ceilings(ceilings: Mapping[int, int]) -> dict[int, int]:
    """Join neighbouring lengths whose largest batch is the same into the longest of them.

    Args:
        ceilings: largest batch for each length; a length stands for all up to it.

    Returns:
        As many entries as there are different neighbours, from the shortest length on.

    Example:
        >>> merge_ceilings({128: 64, 256: 64, 512: 30})
        {256: 64, 512: 30}
    """
    merged: dict[int, int] = {}
    for length, ceiling in sorted(ceilings.items(), reverse=True):
        if not merged or ceiling != merged[min(merged)]:
            merged[length] = ceiling
    return dict(sorted(merged.items()))
