"""Rules that follow the position in the run, or a learning-rate schedule; nothing is measured.

Source: PadaDamp and GeoDamp, Sievert and Charles 2019 (arXiv:1910.08222) and their package
    ``adadamp``; a batch that grows where the learning rate would fall, Smith et al. 2018
    (arXiv:1711.00489) for SGD, Seesaw (arXiv:2510.14717) for Adam.
Differs: PadaDamp and GeoDamp count samples, so that they do not depend on what the batch was
    before; beyond the largest batch the learning rate damps instead, lr·B_max/B (``damps_lr``).
    Seesaw reads any schedule as it runs, instead of replacing it by steps: between two growths of
    the batch the learning rate goes on as scheduled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_ext.scaling._batch_rule import Observation, Proposal
from lightning_ext.scaling._loss_rules import ceiling, power
from lightning_ext.scaling._validate import require_count, require_number, require_positive


@dataclass(frozen=True)
class PadaDamp:
    """Grow by a constant: B = B0 + ⌈rate · k⌉, k = samples seen / B0.

    k counts steps of the reference batch B0. In steps that were really taken the batch would grow
    more slowly the larger it is.

    Args:
        rate: samples per reference step; finite and above 0.

    Example:
        >>> PadaDamp(rate=0.5).propose(Observation(64, 6400, reference_batch=64)).target_batch
        114.0
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    lr_rule: ClassVar[str] = "constant"
    damps_lr: ClassVar[bool] = True

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        require_positive("rate", self.rate)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the batch of this position; ``statistic`` is k."""
        start = observation.reference_batch
        if start is None:
            return None
        steps = observation.samples_seen / start
        reason = f"reference steps {steps:.4g} against rate {self.rate:.4g}"
        return Proposal(start + ceiling(self.rate * steps), steps, reason)


@dataclass(frozen=True)
class GeoDamp:
    """Grow by a factor at equal intervals: B = B0 · factor^⌊samples seen / every_samples⌋.

    Args:
        factor: above 1 and finite.
        every_samples: d, at least 1.

    Example:
        >>> rule = GeoDamp(factor=2.0, every_samples=1000)
        >>> rule.propose(Observation(64, 2500, reference_batch=64)).target_batch
        256.0
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    lr_rule: ClassVar[str] = "constant"
    damps_lr: ClassVar[bool] = True

    factor: float
    every_samples: int

    def __post_init__(self) -> None:
        """Check the arguments."""
        _require_factor(self.factor)
        require_count("every_samples", self.every_samples)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the batch of this position; ``statistic`` is the exponent."""
        start = observation.reference_batch
        if start is None:
            return None
        intervals = observation.samples_seen // self.every_samples
        reason = f"intervals {intervals} against {self.every_samples} samples each"
        return Proposal(start * power(self.factor, intervals), float(intervals), reason)


@dataclass(frozen=True)
class Seesaw:
    """Grow the batch where a schedule lets the learning rate fall.

        target = B0 · factor^⌊log_factor(1/lr_decay)⌋

    ``lr_decay`` is the scheduled learning rate over its largest value so far, B0 the reference
    batch. The optimizer's learning rate is the scheduled one times what ``lr_rule`` says of
    κ = B/B0. Where the schedule cuts it by α < 1, κ becomes 1/α, and

    - ``lr_rule="sqrt"`` (the default, for Adam) leaves lr · α · √(1/α) = lr · √α with batch B/α:
      Seesaw.
    - ``lr_rule="linear"`` (for SGD) leaves lr · α · (1/α) = lr with batch B/α: Smith et al.

    From ``max_global_batch`` on κ stays, and the learning rate falls as scheduled. The rule is
    followed to the letter: where the schedule rises again, the batch shrinks. Use a schedule in
    samples (``optim.SampleSchedule``): one in steps takes as many steps as before, each with more
    samples.

    Args:
        factor: growth of the batch at once; above 1 and finite. A factor near 1 keeps the learning
            rate closest to the equation, a larger one changes the batch less often.

    Example:
        >>> seen = Observation(64, 10_000, reference_batch=64, lr_decay=0.2)
        >>> Seesaw(factor=2.0).propose(seen).target_batch
        256.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"lr_decay"})
    lr_rule: ClassVar[str] = "sqrt"

    factor: float = 2.0

    def __post_init__(self) -> None:
        """Check the factor."""
        _require_factor(self.factor)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the batch of the scheduled learning rate; ``statistic`` is ``lr_decay``."""
        start, decay = observation.reference_batch, observation.lr_decay
        if start is None or decay is None or not 0 < decay < math.inf:
            return None
        # The logarithm of an exact power may come out a little below the whole number.
        cuts = max(math.floor(-math.log(decay) / math.log(self.factor) + 1e-9), 0)
        reason = (
            f"scheduled lr {decay:.4g} against 1 at its largest: {cuts} cuts by {self.factor:.4g}"
        )
        return Proposal(start * power(self.factor, cuts), decay, reason)


def _require_factor(factor: float) -> None:
    require_number("factor", factor)
    if not 1 < factor < math.inf:
        raise ValueError(f"factor={factor!r} is not allowed; it must be above 1 and finite")
