"""Batch-size schedules written as one line of text.

Source: the "start:batch start:batch" form of Megatron-LM's step schedule, and its linear ramp.
Differs: starts count samples unless they say otherwise; percent of the run is a third unit. A
    ramp's steps begin at whole samples, the first at or past the even division.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import ClassVar

from lightning_ext.scaling._batch_rule import Observation, Proposal
from lightning_ext.scaling._validate import require_count, require_non_negative, require_number

_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MARKS = {"samples": "", "tokens": "tok", "percent": "%"}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)([kMBT]?)"
_ENTRY = re.compile(rf"{_NUMBER}(tok|%)?:{_NUMBER}")
_FORM = "'<start>[k|M|B|T][tok|%]:<global_batch>', for example '0:256 1M:512' or '0:256 50%:512'"


@dataclass(frozen=True)
class BatchSizeSchedule:
    """A global batch that changes at given positions of the run.

    It is also a rule: ``propose`` answers with the entry that holds at the observed position.

    Args:
        starts: positions at which the entries begin, strictly increasing, the first 0.
        global_batches: samples per optimizer step from each start on.
        unit: what the starts count, ``"samples"``, ``"tokens"`` or ``"percent"``.

    Raises:
        TypeError: if a number is not a number, or a batch not an integer.
        ValueError: if the entries are not as described.

    Example:
        >>> BatchSizeSchedule.parse("0:256 1M:512").at(samples=1_500_000)
        512
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    starts: tuple[float, ...]
    global_batches: tuple[int, ...]
    unit: str = "samples"

    def __post_init__(self) -> None:
        """Check the entries."""
        if self.unit not in _MARKS:
            raise ValueError(f"unit={self.unit!r} is not known; choose one of {', '.join(_MARKS)}")
        if not self.starts or len(self.starts) != len(self.global_batches):
            raise ValueError(
                f"{len(self.starts)} starts and {len(self.global_batches)} global batches were "
                "given; a schedule has at least one entry, each with both"
            )
        for batch in self.global_batches:
            require_count("global_batch", batch)
        for start in self.starts:
            require_non_negative("start", start)
        self._check_order()

    def _check_order(self) -> None:
        if self.starts[0] != 0:
            raise ValueError(
                f"the first start is {self.starts[0]}; it must be 0, the batch to begin with"
            )
        for before, after in pairwise(self.starts):
            if before >= after:
                raise ValueError(f"start {after} follows {before}; starts must strictly increase")
        if self.unit == "percent" and self.starts[-1] >= 100:
            raise ValueError(f"start {self.starts[-1]}% is never reached; percents end below 100")

    @classmethod
    def parse(cls, text: str, *, unit: str = "samples") -> BatchSizeSchedule:
        """Read entries ``<start>[k|M|B|T][tok|%]:<global_batch>`` separated by blanks.

        Suffixes are decimal (k = 1e3, M = 1e6, B = 1e9, T = 1e12) and may follow the batch too.
        All entries count the same thing; a bare 0 goes with any unit.

        Args:
            text: the schedule.
            unit: what a bare start counts: ``"samples"``, or ``"tok"`` for tokens, which reads
                Megatron's form.

        Returns:
            The schedule.

        Raises:
            TypeError: if ``text`` is not a string.
            ValueError: if an entry cannot be read or the entries do not fit together.

        Example:
            >>> str(BatchSizeSchedule.parse("0:768 250B:1536", unit="tok"))
            '0tok:768 250Btok:1536'
        """
        if not isinstance(text, str):
            raise TypeError(f"a schedule must be a string, got {type(text).__name__}; use {_FORM}")
        if unit not in ("samples", "tok"):
            raise ValueError(f"unit={unit!r} is not known; choose 'samples' or 'tok'")
        entries = [_parse_entry(entry, unit) for entry in text.split()]
        if not entries:
            raise ValueError(f"the schedule {text!r} has no entries; use {_FORM}")
        marked = {mark for start, mark, _ in entries if start or mark} or {unit}
        units = {_unit_of(mark or unit) for mark in marked}
        if len(units) > 1:
            raise ValueError(
                f"the schedule {text!r} mixes {' and '.join(sorted(units))}; use one unit"
            )
        (name,) = units
        starts = tuple(_plain(start, name) for start, _, _ in entries)
        return cls(starts, tuple(batch for _, _, batch in entries), name)

    @classmethod
    def ramp(cls, start: int, increment: int, samples: int, end: int) -> BatchSizeSchedule:
        """Grow in equal steps: Megatron's ``--rampup-batch-size start increment samples``.

            start + k · increment  from sample  ⌈k · samples/n⌉  on,   n = (end − start)/increment

        Args:
            start: the batch to begin with.
            increment: what each step adds; divides ``end − start``.
            samples: where the last step ends the ramp; at least n.
            end: the batch from there on, Megatron's ``--global-batch-size``; above ``start``.

        Returns:
            The schedule, in samples.

        Raises:
            TypeError: if a value is not an integer.
            ValueError: if a value is below 1, or they do not fit together.

        Example:
            >>> str(BatchSizeSchedule.ramp(16, 8, 300, end=40))
            '0:16 100:24 200:32 300:40'
        """
        given = {"start": start, "increment": increment, "samples": samples, "end": end}
        for name, value in given.items():
            require_count(name, value)
        steps, rest = divmod(end - start, increment)
        if steps < 1 or rest or samples < steps:
            raise ValueError(
                f"{given} is no ramp: end must be above start by a multiple of increment, "
                "and each step takes at least a sample"
            )
        starts = tuple(-(-k * samples // steps) for k in range(steps + 1))
        return cls(starts, tuple(range(start, end + 1, increment)))

    @property
    def max_global_batch(self) -> int:
        """The largest batch of the schedule, in samples."""
        return max(self.global_batches)

    def at(
        self,
        *,
        samples: float | None = None,
        tokens: float | None = None,
        total_samples: float | None = None,
    ) -> int:
        """Return the global batch at a position; quantities of other units are ignored.

        Args:
            samples: samples seen; needed by samples and percent.
            tokens: tokens seen; needed by tokens.
            total_samples: samples of the whole run; needed by percent.

        Returns:
            The global batch of the last entry that has begun.

        Raises:
            TypeError: if a quantity is not a number.
            ValueError: if a quantity that the unit needs is missing or negative.
        """
        return self.global_batches[self._index(self._position(samples, tokens, total_samples))]

    def propose(self, observation: Observation) -> Proposal:
        """Return the entry that holds at the observed position.

        Raises:
            ValueError: if the observation lacks what the unit needs.
        """
        position = self._position(
            observation.samples_seen, observation.tokens_seen, observation.total_samples
        )
        index = self._index(position)
        batch = float(self.global_batches[index])
        return Proposal(batch, position, f"schedule {self._entry(index)}")

    def __str__(self) -> str:
        """Return the text that ``parse`` reads back."""
        return " ".join(self._entry(index) for index in range(len(self.starts)))

    def _entry(self, index: int) -> str:
        start = _short(self.starts[index]) + _MARKS[self.unit]
        return f"{start}:{self.global_batches[index]}"

    def _index(self, position: float) -> int:
        return bisect_right(self.starts, position) - 1

    def _position(
        self, samples: float | None, tokens: float | None, total_samples: float | None
    ) -> float:
        if self.unit == "tokens":
            return _given("tokens", tokens, self.unit)
        seen = _given("samples", samples, self.unit)
        if self.unit == "samples":
            return seen
        total = _given("total_samples", total_samples, self.unit)
        if total == 0:
            raise ValueError("total_samples=0 is not allowed; a run has at least one sample")
        return 100 * seen / total


def _parse_entry(entry: str, unit: str) -> tuple[Decimal, str | None, int]:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(f"the schedule entry {entry!r} cannot be read; use {_FORM}")
    start, suffix, mark, batch, batch_suffix = match.groups()
    if mark == "%" and suffix:
        raise ValueError(f"the schedule entry {entry!r} has {suffix!r} before '%'; write 12.5%")
    position = Decimal(start) * _FACTORS[suffix]
    if mark != "%" and position % 1:
        raise ValueError(f"the schedule entry {entry!r} starts at a fraction of a {mark or unit}")
    size = Decimal(batch) * _FACTORS[batch_suffix]
    if size % 1 or size < 1:
        raise ValueError(
            f"the schedule entry {entry!r} has the global batch {size}; it must be a whole number "
            "of at least 1"
        )
    return position, mark, int(size)


def _unit_of(mark: str) -> str:
    return {"samples": "samples", "tok": "tokens", "%": "percent"}[mark]


def _plain(start: Decimal, unit: str) -> float:
    return float(start) if unit == "percent" else int(start)


def _short(start: float) -> str:
    for suffix, factor in reversed(_FACTORS.items()):
        if start and factor > 1 and start % factor == 0:
            return f"{int(start) // factor}{suffix}"
    return format(Decimal(repr(start)).normalize(), "f")


def _given(name: str, value: float | None, unit: str) -> float:
    if value is None:
        hint = " with a reader that counts them" if name == "tokens" else ""
        raise ValueError(f"a schedule in {unit} needs {name}; pass {name}={hint}")
    require_number(name, value)
    require_non_negative(name, value)
    return value
