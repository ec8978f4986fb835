"""How a strategy cuts batches of the loader, and which micro-batch's backward pass is running."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException


class MicroBatches:
    """Sizes of a fit, which callbacks may change, and the running backward pass.

    Attributes:
        count: Micro-batches of the coming batches of the loader.
        samples: Of each on one rank; ``None`` before the first batch.
        weight: Factor of the loss of the coming batch.
        ran: Micro-batches of the last batch.
        running: Index of the one whose backward pass is running.
    """

    def __init__(self) -> None:
        self.begin(1, 1, any_number=True)

    def begin(self, count: int, accumulate: int, *, any_number: bool) -> None:
        """Starts a fit.

        Args:
            count: Micro-batches of the first batch.
            accumulate: Batches of an optimizer step, to begin with.
            any_number: Whether the schedule takes any number of micro-batches, not only multiples
                of the first.
        """
        self.count, self._first = count, (count, accumulate)
        self.any_number = any_number
        self.samples: int | None = None
        self.weight = 1.0
        self.ran = 0
        self.running: int | None = None
        self._followers: list[Callable[[], None]] = []

    @property
    def first(self) -> int:
        """Micro-batches of an optimizer step to begin with."""
        return math.prod(self._first)

    def split(self, batch: int, accumulate: int) -> tuple[int, int]:
        """Micro-batch and micro-batches of a step, of a loader's batch and batches of a step.

        Raises:
            MisconfigurationException: The first batch cannot be cut.
        """
        if self.samples is None:
            if batch % self.count:
                raise MisconfigurationException(
                    f"The loader's batch of {batch} samples cannot be cut into {self.count} equal"
                    f" micro-batches. Allowed are multiples of {self.count}. Hint: another"
                    " batch_size, or num_microbatches."
                )
            self.samples = batch // self.count
        return self.samples, accumulate * batch // self.samples

    def joined(self, micro_batch: int, accumulate: int) -> tuple[int, int]:
        """A loader's batch and batches of a step that make micro-batches of a step.

        A step keeps its number of batches where it can.
        """
        batches = math.gcd(accumulate, self._first[1])
        return micro_batch * accumulate // batches, batches

    def follow(self, before: Callable[[], None]) -> Callable[[], None]:
        """Has something called before each backward pass of a micro-batch through a stage.

        Args:
            before: It.

        Returns:
            What ends that.
        """
        self._followers.append(before)

        def leave() -> None:
            if before in self._followers:
                self._followers.remove(before)

        return leave

    @contextmanager
    def backward(self, index: int) -> Iterator[None]:
        """The backward pass of a micro-batch through a stage.

        Args:
            index: Of the micro-batch in its batch.
        """
        for before in self._followers:
            before()
        self.running = index
        try:
            yield
        finally:
            self.running = None
