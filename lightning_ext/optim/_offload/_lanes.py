"""In which order a device copies states in, updates them and copies them back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

Pairs = Iterable[tuple[Tensor, Tensor]]  # a part of a buffer, and its host memory


class Stream(Protocol):
    """What a device does one after the other, as ``torch.cuda.Stream``."""

    def wait_event(self, event: Any) -> None:
        """Let what follows wait for an event."""

    def wait_stream(self, stream: Any) -> None:
        """Let what follows wait for all that another stream has to do now."""

    def record_event(self) -> Any:
        """Return what has happened when all so far is done."""

    def synchronize(self) -> None:
        """Let the host wait until all is done."""


class Streams(Protocol):
    """Makes streams of a device and copies on them."""

    def make(self) -> Stream:
        """Return a new stream."""

    def current(self) -> Stream:
        """Return the stream on which steps are taken."""

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Copy on a stream, and do not wait."""


class Lanes:
    """One stream into two buffers, one out of them, and the steps between.

    A buffer is filled again when it has been copied back, a state is copied in again when the last
    step's copy has come home. The host waits for nothing but in ``wait``.

    Args:
        streams: of the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._in, self._out = streams.make(), streams.make()
        self._fetched: dict[int, Any] = {}
        self._stored: dict[int, Any] = {}
        self._pending = False

    def begin(self) -> None:
        """Begin a step."""
        self._in.wait_stream(self._out)
        # New buffers may be memory that the steps' stream is not done with.
        self._in.wait_stream(self._streams.current())

    def fetch(self, slot: int, pairs: Pairs) -> None:
        """Copy into a buffer."""
        if slot in self._stored:
            self._in.wait_event(self._stored[slot])
        for buffer, host in pairs:
            self._streams.copy(self._in, buffer, host)
        self._fetched[slot] = self._in.record_event()

    def ready(self, slot: int) -> None:
        """Let the steps wait for a buffer."""
        self._streams.current().wait_event(self._fetched[slot])

    def store(self, slot: int, pairs: Pairs) -> None:
        """Copy a buffer back when the steps so far are done."""
        self._out.wait_event(self._streams.current().record_event())
        for buffer, host in pairs:
            self._streams.copy(self._out, host, buffer)
        self._stored[slot] = self._out.record_event()
        self._pending = True

    def wait(self) -> None:
        """Let the host wait until all states are home."""
        if self._pending:
            self._in.synchronize()
            self._out.synchronize()
            self._pending = False


class CudaStreams:
    """Streams of a CUDA device.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self) -> Any:
        """Return a new stream."""
        return torch.cuda.Stream(self._device)

    def current(self) -> Any:
        """Return the stream that the caller is on."""
        return torch.cuda.current_stream(self._device)

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Copy on a stream; host memory is pinned."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)


class PlainStreams:
    """No streams: copies are done when they are asked for."""

    def make(self) -> Stream:
        """Return what waits for nothing."""
        return _AtOnce()

    current = make

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Copy."""
        target.copy_(source)


class _AtOnce:
    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> Any: ...

    def synchronize(self) -> None: ...


def streams_of(device: torch.device) -> Streams:
    """Return the streams of a device; without any where it is not CUDA's.

    Args:
        device: of the parameters.
    """
    return CudaStreams(device) if device.type == "cuda" else PlainStreams()
