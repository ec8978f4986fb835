"""What a rule for the batch sees, what it answers, and the protocol between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning_ext.scaling._noise import NoiseScale


@dataclass(frozen=True)
class Observation:
    """State of training at the moment a rule is asked.

    Args:
        global_batch: samples per optimizer step at present.
        samples_seen: samples that training has used so far.
        noise: the current estimate of the noise scale, if there is one.
        tokens_seen: tokens that training has used so far, where they are known.
        total_samples: samples that the whole run will use, where it is known.
    """

    global_batch: int
    samples_seen: int
    noise: NoiseScale | None = None
    tokens_seen: int | None = None
    total_samples: int | None = None


@dataclass(frozen=True)
class Proposal:
    """Answer of a rule.

    Args:
        target_batch: the global batch that the rule asks for, in samples; not rounded, not
            limited, may be infinite.
        statistic: the number that the rule looked at.
        reason: one line for the log.
    """

    target_batch: float
    statistic: float
    reason: str


@runtime_checkable
class BatchRule(Protocol):
    """A rule that proposes a global batch."""

    @property
    def needs_noise(self) -> bool:
        """Whether the rule reads ``Observation.noise``."""

    def propose(self, observation: Observation) -> Proposal | None:
        """Return the batch to move to, or ``None`` for no opinion yet."""
