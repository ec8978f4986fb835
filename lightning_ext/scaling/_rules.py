"""Rules that read the gradient noise, and the reader of a rule's name.

Source: noise scale, McCandlish et al. 2018 (arXiv:1812.06162, section 2.2); norm test, Bollapragada
    et al. 2018 (arXiv:1710.11258, section 2) in the form of Lau et al. 2024 (arXiv:2402.11215).
Differs: the norm test divides by the unbiased |G|² instead of the squared norm of the measured
    gradient, which contains S/B and holds the proposal below B/η²; ``plug_in=True`` is that form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_ext.scaling._batch_rule import BatchRule, Observation, Proposal
from lightning_ext.scaling._noise import NoiseScale
from lightning_ext.scaling._schedule import BatchSizeSchedule
from lightning_ext.scaling._validate import require_positive

_CHOICES = "'noise_scale', 'norm_test' or a schedule such as '0:256 1M:512'"


@dataclass(frozen=True)
class NoiseScaleRule:
    """Follow the noise scale: target = factor · S/|G|².

    Where the averaged |G|² does not differ from 0 at the given confidence, the noise scale has no
    upper limit and its estimate means little. A batch that only grows could not take back a jump
    made on such a measurement, so the rule then proposes from the lower confidence limit, and has
    no opinion while that is 0.

    Args:
        factor: proposed batch over noise scale; finite and above 0.

    Example:
        >>> noise = NoiseScale(512.0, 400.0, 700.0, 1.0, 512.0, 10_000)
        >>> NoiseScaleRule().propose(Observation(64, 10_000, noise)).target_batch
        512.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise"})

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the factor."""
        require_positive("factor", self.factor)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return ``factor`` times the noise scale, or ``None`` before it is known."""
        noise = observation.noise
        size = _supported(noise)
        if noise is None or size is None:
            return None
        return Proposal(self.factor * size, noise.value, _describe(noise))


@dataclass(frozen=True)
class NormTest:
    """Keep the batch passing S/B ≤ η²·|G|²: target = S / (η²·|G|²).

    ``plug_in=True`` puts the squared norm of the batch gradient, |G|² + S/B, in the place of
    |G|²: with |G|² ≥ 0 the target then never exceeds B/η², whatever the interval. Without it, a
    noise scale that has no upper limit is treated as by ``NoiseScaleRule``.

    Args:
        eta: η, the noise allowed relative to the gradient; finite and above 0.
        plug_in: use the published, biased denominator.

    Example:
        >>> noise = NoiseScale(512.0, 400.0, 700.0, 1.0, 512.0, 10_000)
        >>> NormTest(eta=0.5).propose(Observation(64, 10_000, noise)).target_batch
        2048.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise"})

    eta: float = 0.5
    plug_in: bool = False

    def __post_init__(self) -> None:
        """Check η."""
        require_positive("eta", self.eta)

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the least batch that passes the test, or ``None`` before it is known.

        ``statistic`` is the tested ratio, S/(B·|G|²) or its plug-in form; the test passes while it
        is at most η².
        """
        noise, batch = observation.noise, observation.global_batch
        size = _plug_in(noise, batch) if self.plug_in else _supported(noise)
        if noise is None or size is None:
            return None
        statistic = size / batch
        reason = f"norm test {statistic:.4g}, {_describe(noise)}"
        return Proposal(size / self.eta**2, statistic, reason)


def parse_rule(rule: str | BatchRule) -> BatchRule:
    """Turn the name of a rule, or the text of a schedule, into a rule.

    Args:
        rule: ``"noise_scale"``, ``"norm_test"``, a text with a colon for
            ``BatchSizeSchedule.parse``, or a rule, which is returned as it is.

    Returns:
        The rule.

    Raises:
        TypeError: if it is neither a string nor an instance of a rule.
        ValueError: if the name is not known or the schedule cannot be read.

    Example:
        >>> parse_rule("norm_test")
        NormTest(eta=0.5, plug_in=False)
    """
    if isinstance(rule, str):
        return _parse_name(rule)
    if isinstance(rule, type) or not isinstance(rule, BatchRule):
        raise TypeError(
            f"a rule must be {_CHOICES}, or an object with needs and propose(observation), "
            f"got {rule!r}; pass an instance, not a class"
        )
    return rule


def _parse_name(name: str) -> BatchRule:
    if ":" in name:
        return BatchSizeSchedule.parse(name)
    if name == "noise_scale":
        return NoiseScaleRule()
    if name == "norm_test":
        return NormTest()
    raise ValueError(f"rule {name!r} is not known; choose {_CHOICES}, or pass a rule object")


def _supported(noise: NoiseScale | None) -> float | None:
    """Return the noise scale, its lower limit where it has no upper one; None if not above 0."""
    if noise is None:
        return None
    size = noise.low if math.isinf(noise.high) else noise.value
    return size if 0 < size < math.inf else None


def _plug_in(noise: NoiseScale | None, global_batch: int) -> float | None:
    if noise is None:
        return None
    batch_sq_norm = noise.grad_sq_norm + noise.grad_trace / global_batch
    if not (batch_sq_norm > 0 and noise.grad_trace > 0):
        return None
    return noise.grad_trace / batch_sq_norm


def _describe(noise: NoiseScale) -> str:
    return (
        f"noise scale {noise.value:.4g} ({noise.low:.4g} to {noise.high:.4g}) "
        f"from {noise.samples} samples"
    )
