"""How far a run has come, in samples and in what its steps are worth."""

from __future__ import annotations

from typing import Any, Literal, get_args

Unit = Literal["samples", "gain", "steps"]
UNITS: tuple[str, ...] = get_args(Unit)


class Progress:
    """Counts samples, and the samples of the reference batch that the same progress would take.

    Args:
        unit: What a step counts: ``"samples"``, those it takes; ``"gain"``, the reference batch
            times the gain of its learning rate; ``"steps"``, the reference batch.
        tokens_per_sample: For runs that count tokens.
        total_samples: Of the whole run, where it is known.
    """

    def __init__(self, unit: str, tokens_per_sample: int | None, total_samples: int | None) -> None:
        self.unit = unit
        self.total_samples = total_samples
        self.tokens_per_sample = tokens_per_sample
        self.reset()

    def reset(self) -> None:
        """Begins at 0."""
        self.samples_seen = 0
        self.reference_samples = 0.0

    @property
    def tokens_seen(self) -> int | None:
        """Tokens of all steps, where they are known."""
        per_sample = self.tokens_per_sample
        return None if per_sample is None else self.samples_seen * per_sample

    def position(self) -> dict[str, Any]:
        """The fields of an observation that say how far the run has come."""
        return {
            "samples_seen": self.samples_seen,
            "tokens_seen": self.tokens_seen,
            "total_samples": self.total_samples,
        }

    def worth(self, samples: int, *, kappa: float, gain: float) -> float:
        """What a step of so many samples counts.

        Args:
            samples: Of the step; a cut one has fewer than planned and counts as less.
            kappa: Planned batch over reference batch.
            gain: Steps at the reference batch that the planned step is worth.
        """
        if self.unit == "samples":
            return samples
        return samples / kappa * (gain if self.unit == "gain" else 1.0)

    def add(self, samples: int, worth: float) -> None:
        """Counts one optimizer step."""
        self.samples_seen += samples
        self.reference_samples += worth

    def values(self) -> dict[str, float]:
        """What there is to log."""
        values = {"samples_seen": float(self.samples_seen)}
        if self.tokens_seen is not None:
            values["tokens_seen"] = float(self.tokens_seen)
        if self.unit != "samples":
            values["progress_samples"] = self.reference_samples
        return values

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"samples_seen": self.samples_seen, "reference_samples": self.reference_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from both counts."""
        self.samples_seen = state["samples_seen"]
        self.reference_samples = state["reference_samples"]
