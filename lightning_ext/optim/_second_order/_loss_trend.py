"""Whether a loss still falls as it once did.

Source: Mozaffari et al. 2023 (MKOR-H, arXiv:2306.01685): the switch back to first order by the rate
    at which the loss falls.
Differs: the paper's exact criterion could not be had, and the released code has none; this one is
    ours.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass
class LossTrend:
    """Rates at which the mean loss of one window of steps falls to the next one's.

        r ← EMA of (ℓ_last − ℓ), without bias;    over where r < threshold · max r

    Attributes:
        total: of the losses of the present window.
        count: of them.
        last: mean loss of the window before; NaN before the first.
        rate: r before its bias is taken out.
        windows: how many rates r has seen.
        best: the largest r so far.
        over: 1 from the window on in which r fell below its share.
    """

    total: float = 0.0
    count: float = 0.0
    last: float = math.nan
    rate: float = 0.0
    windows: float = 0.0
    best: float = 0.0
    over: float = 0.0

    def add(self, total: float, count: float = 1.0) -> None:
        """Add a step's losses; what is not finite is left out.

        Args:
            total: of the losses of all ranks, so that a checkpoint of any rank holds it.
            count: of ranks that had one.
        """
        if math.isfinite(total):
            self.total += total
            self.count += count

    def close_window(self, threshold: float, decay: float) -> None:
        """Compare this window with the one before; no verdict before 1/(1 − decay) of them.

        Args:
            threshold: the share of the best rate.
            decay: of the moving average, in [0, 1).
        """
        total, count = self.total, self.count
        self.total = self.count = 0.0
        if not count:
            return
        mean = total / count
        if not math.isnan(self.last):
            self.rate = decay * self.rate + (1 - decay) * (self.last - mean)
            self.windows += 1
            rate = self.rate / (1 - decay**self.windows)
            self.best = max(self.best, rate)
            settled = self.windows * (1 - decay) >= 1 - 1e-9
            if settled and self.best > 0 and rate < threshold * self.best:
                self.over = 1.0
        self.last = mean

    def save(self) -> Tensor:
        """Return all of it, in float64."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def load(cls, saved: Tensor) -> LossTrend:
        """Return what ``save`` was called on."""
        return cls(*saved.tolist())
