"""Goodput: the batch that makes the most progress per second, and a model of the step time.

Source: Qiao et al. 2021 (Pollux, arXiv:2008.12260, sections 3.1 to 3.3).
Differs: the published step time is accumulate·T_acc + (T_acc^γ + T_net^γ)^(1/γ), fitted over many
    allocations of machines. One run keeps its machines, so that T_net, γ and what T_acc has for
    every step cannot be told apart; what it can vary are micro-batch and accumulation, and the fit
    is linear in them. The noise scale is the unbiased ratio of averages, and where it has no upper
    limit its lower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lightning_ext.scaling._batch_rule import Observation, Proposal
from lightning_ext.scaling._noise_rules import supported_noise_scale
from lightning_ext.scaling._validate import require_non_negative, require_positive

# Columns fixed, per micro-batch, per sample; the more optimistic about a larger batch, the earlier.
_MODELS = ((1,), (0, 1), (1, 2), (0, 1, 2))
_GRID = 2**0.25


class StepTime(NamedTuple):
    """Seconds of an optimizer step, from its micro-batch and accumulation.

        seconds = fixed + accumulate · (per_micro_batch + per_sample · micro_batch)

    Args:
        fixed_s: optimizer, reduction over ranks.
        per_micro_batch_s: launching a forward and backward pass.
        per_sample_s: computing it.
    """

    fixed_s: float
    per_micro_batch_s: float
    per_sample_s: float

    def seconds(self, micro_batch: float, accumulate: float) -> float:
        """Return the predicted seconds of a step."""
        per_pass = self.per_micro_batch_s + self.per_sample_s * micro_batch
        return self.fixed_s + accumulate * per_pass

    @classmethod
    def fit(cls, rows: Iterable[tuple[float, float, float, float]]) -> StepTime:
        """Fit the coefficients, each at least 0, to the relative errors of measured times.

            minimise  Σ weight · (predicted/seconds − 1)²

        Where the sizes that have run cannot tell two coefficients apart, the time goes to the one
        that promises more of a larger batch: of one size, all of it to ``per_micro_batch_s``, so
        that a larger micro-batch costs nothing until one has been measured. A rule that follows
        the fit tries it then, and the next fit knows (Pollux's prior-driven exploration).

        Args:
            rows: ``(micro_batch, accumulate, seconds, weight)`` of steps that ran; the weight is
                the number of steps that the time is a mean of. All above 0, in any order.

        Returns:
            The coefficients.

        Raises:
            TypeError: if an entry is not a number.
            ValueError: if there are no rows, or an entry is not finite and above 0.

        Example:
            >>> StepTime.fit([(8, 2, 0.1, 50)]).seconds(16, 2)
            0.1
        """
        import numpy as np
        from scipy.optimize import nnls

        table = np.asarray(_checked(rows), dtype=np.float64)
        micro_batch, accumulate, seconds, weight = table.T
        design = np.stack([np.ones_like(seconds), accumulate, accumulate * micro_batch], axis=1)
        root = np.sqrt(weight / weight.sum())
        design *= (root / seconds)[:, None]
        fits = [nnls(design[:, columns], root) for columns in _MODELS]
        # The smallest model that does as well as all three; 1e-9 of a step is rounding.
        found = next(k for k, (_, error) in enumerate(fits) if error <= fits[-1][1] + 1e-9)
        values = np.zeros(3)
        values[list(_MODELS[found])] = fits[found][0]
        return cls(*values.tolist())


@dataclass(frozen=True)
class GoodputRule:
    """Take the batch with the most progress per second.

        goodput(B) = B/T(B) · (B_noise + B0)/(B_noise + B)

    Samples per second times their worth relative to samples at the reference batch B0. Among B0 and
    the batches 2^(1/4) apart from there to the largest, the best is proposed where it promises at
    least ``min_gain`` over the present batch; else the present batch.

    Args:
        min_gain: least relative gain that is worth a change; at least 0. 0.05 is ours: below it
            the timing of a busy machine cannot be trusted.

    Example:
        >>> noise = NoiseScale(512.0, 400.0, 700.0, 1.0, 512.0, 10_000)
        >>> seen = Observation(
        ...     64,
        ...     10_000,
        ...     noise,
        ...     reference_batch=64,
        ...     max_global_batch=256,
        ...     step_seconds=lambda batch: 0.1,
        ... )
        >>> GoodputRule().propose(seen).target_batch  # steps cost the same, whatever their batch
        256.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise", "step_seconds"})

    min_gain: float = 0.05

    def __post_init__(self) -> None:
        """Check the gain."""
        require_non_negative("min_gain", self.min_gain)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the batch of the largest goodput; ``statistic`` is its gain over the present."""
        size, seconds = supported_noise_scale(observation.noise), observation.step_seconds
        start, largest = observation.reference_batch, observation.max_global_batch
        if size is None or seconds is None or start is None or largest is None:
            return None
        present = observation.global_batch
        rates = {
            batch: _goodput(batch, size, start, seconds)
            for batch in (present, *_candidates(start, largest))
        }
        best = max(rates, key=lambda batch: rates[batch])
        if not rates[present] > 0:
            return None
        gain = rates[best] / rates[present] - 1
        target = best if gain >= self.min_gain else present
        reason = (
            f"goodput gain {gain:.4g} of batch {best} against min_gain {self.min_gain:.4g}: "
            f"noise scale {size:.4g}, step {seconds(present):.4g} s"
        )
        return Proposal(float(target), gain, reason)


def _goodput(batch: int, size: float, start: int, seconds: Callable[[int], float]) -> float:
    """Return samples per second in samples of the reference batch; 0 where the time is unknown."""
    time = seconds(batch)
    if not (math.isfinite(time) and time > 0):
        return 0.0
    return batch / time * (size + start) / (size + batch)


def _candidates(start: int, largest: int) -> list[int]:
    if largest < start:
        return []
    steps = math.floor(math.log(largest / start, _GRID))
    return sorted({*(round(start * _GRID**k) for k in range(steps + 1)), largest})


def _checked(
    rows: Iterable[tuple[float, float, float, float]],
) -> list[tuple[float, float, float, float]]:
    table = list(rows)
    if not table:
        raise ValueError("no rows were given; measure at least one step before fitting")
    for row in table:
        names = ("micro_batch", "accumulate", "seconds", "weight")
        for name, value in zip(names, row, strict=True):
            require_positive(name, value)
    return table
