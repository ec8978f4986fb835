"""Streams of a device that do all that they have to at the last moment."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

from torch import Tensor


class Late:
    """A stream that does what it has to at the last moment, when somebody waits for it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.queue: list[Callable[[], object]] = []
        self.done = 0

    def reach(self, length: int) -> None:
        while self.done < length:
            self.done += 1
            self.queue[self.done - 1]()

    def record_event(self) -> Event:
        return Event(self, len(self.queue))

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.stream.name}")
        self.queue.append(event.happen)

    def wait_stream(self, other: Late) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.reach(len(self.queue))


class Event:
    def __init__(self, stream: Late, length: int) -> None:
        self.stream, self.length = stream, length

    def happen(self) -> None:
        self.stream.reach(self.length)


class Now(Late):
    """The stream of the steps, which a test takes at once."""

    def wait_event(self, event: Event) -> None:
        super().wait_event(event)
        self.synchronize()


class LateStreams:
    """Streams that show every wait that is missing."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = cycle(("in", "out"))
        self.steps = Now("step", self.log)

    def make(self) -> Late:
        return Late(next(self.names), self.log)

    def current(self) -> Late:
        return self.steps

    def copy(self, stream: Late, target: Tensor, source: Tensor) -> None:
        self.log.append(f"{stream.name} copies")
        stream.queue.append(lambda: target.copy_(source))
