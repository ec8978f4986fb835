"""Seconds of a step from its bytes, and from where on communication hides behind compute.

Source: derived; the model of bandwidth and latency of Hockney 1994. Wang et al. 2023 (ZeRO++,
    arXiv:2306.10209, section 5) measure throughput against bandwidth and micro-batch.
Differs: a model. It knows no contention, no topology within a node, and no cost of quantizing but
    what the caller adds to the compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_ext.scaling._communication._traffic import Traffic
from lightning_ext.scaling._communication._volume import CommunicationBytes
from lightning_ext.scaling._validate import (
    require_count,
    require_fraction,
    require_non_negative,
    require_positive,
)

_FORWARD = 1 / 3


@dataclass(frozen=True)
class Links:
    """How fast one rank sends.

        seconds = max(intra_bytes/intra_bandwidth, inter_bytes/inter_bandwidth) + messages·latency_s

    Both links work at once; one after the other, they would take at most twice as long.

    Args:
        intra_bandwidth: bytes per second to ranks of the same node.
        inter_bandwidth: bytes per second to ranks of other nodes: of one rank, which has its share
            of what the node has.
        latency_s: seconds that every message costs besides.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a bandwidth is not above 0, or the latency below 0.

    Example:
        >>> Links(100e9, 10e9, latency_s=0.5).seconds(Traffic(10**10, 10**10, 1, 0))
        1.5
    """

    intra_bandwidth: float
    inter_bandwidth: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuses links that take no bytes."""
        require_positive("intra_bandwidth", self.intra_bandwidth)
        require_positive("inter_bandwidth", self.inter_bandwidth)
        require_non_negative("latency_s", self.latency_s)

    def seconds(self, traffic: Traffic) -> float:
        """Return how long a rank takes to send."""
        inside = traffic.intra_bytes / self.intra_bandwidth
        between = traffic.inter_bytes / self.inter_bandwidth
        return max(inside, between) + traffic.total_messages * self.latency_s


def step_time(
    communication: CommunicationBytes,
    links: Links,
    compute_s: float,
    *,
    overlap: float = 1.0,
    forward_part: float = _FORWARD,
) -> float:
    """Return the seconds of an optimizer step.

        Σ_phase  compute + sent − overlap·min(compute, sent)

    The phases are the forward pass with its gathers, and the backward pass with its gathers and the
    gradients. With ``overlap=1`` a phase takes as long as the longer of both.

    Args:
        communication: what a rank sends in the step.
        links: how fast.
        compute_s: seconds of computing the step, of all micro-batches, quantizing included.
        overlap: part of the shorter that hides behind the longer, in [0, 1].
        forward_part: of the compute that is in the forward pass: 1/3, or 1/4 where activations are
            computed again.

    Returns:
        Seconds.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> sent = CommunicationBytes(forward=Traffic(inter_bytes=10**9))
        >>> step_time(sent, Links(1e12, 1e9), 1.5)  # a second of sending, behind half of one
        2.0
    """
    require_non_negative("compute_s", compute_s)
    require_fraction("overlap", overlap)
    require_fraction("forward_part", forward_part)
    total = 0.0
    for part, sent in _phases(communication, forward_part):
        compute, send = part * compute_s, links.seconds(sent)
        total += compute + send - overlap * min(compute, send)
    return total


def break_even_bandwidth(
    communication: CommunicationBytes,
    compute_s: float,
    *,
    intra_bandwidth: float = math.inf,
    latency_s: float = 0.0,
    forward_part: float = _FORWARD,
) -> float:
    """Return the bandwidth between nodes from which on communication hides behind compute.

        max_phase  inter_bytes/(compute − messages·latency_s)

    On faster links sending fewer bytes saves no time: a quantized strategy pays below what this is
    for the plain one.

    Args:
        communication: what a rank sends in the step.
        compute_s: seconds of computing the step.
        intra_bandwidth: bytes per second of a rank inside its node; infinite by default.
        latency_s: seconds of every message.
        forward_part: as in :func:`step_time`.

    Returns:
        Bytes per second of one rank; infinite where no link is fast enough, 0 where any is.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> sent = CommunicationBytes(forward=Traffic(inter_bytes=10**9))
        >>> break_even_bandwidth(sent, 1.5)
        2000000000.0
    """
    require_non_negative("compute_s", compute_s)
    require_fraction("forward_part", forward_part)
    if intra_bandwidth != math.inf:
        require_positive("intra_bandwidth", intra_bandwidth)
    require_non_negative("latency_s", latency_s)
    found = 0.0
    for part, sent in _phases(communication, forward_part):
        left = part * compute_s - sent.total_messages * latency_s
        if left < 0 or sent.intra_bytes > left * intra_bandwidth:
            return math.inf
        if sent.inter_bytes:
            found = max(found, sent.inter_bytes / left if left else math.inf)
    return found


def break_even_micro_batch(
    communication: CommunicationBytes,
    links: Links,
    sample_s: float,
    *,
    accumulate: int = 1,
    forward_part: float = _FORWARD,
) -> float:
    """Return the micro-batch from which on communication hides behind compute.

        max_phase  seconds(phase)/(accumulate · sample_s · part of the compute in the phase)

    A quantized strategy pays below what this is for the plain one.

    Args:
        communication: what a rank sends in the step, with its accumulation.
        links: how fast.
        sample_s: seconds of computing one sample, forward and backward.
        accumulate: micro-batches of the step.
        forward_part: as in :func:`step_time`.

    Returns:
        Samples, not rounded; infinite where a phase sends and has no compute.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if a value is out of range.

    Example:
        >>> sent = CommunicationBytes(forward=Traffic(inter_bytes=10**9))
        >>> break_even_micro_batch(sent, Links(1e12, 1e9), sample_s=0.25)
        12.0
    """
    require_positive("sample_s", sample_s)
    require_count("accumulate", accumulate)
    require_fraction("forward_part", forward_part)
    found = 0.0
    for part, sent in _phases(communication, forward_part):
        compute, send = part * accumulate * sample_s, links.seconds(sent)
        if send:
            found = max(found, send / compute if compute else math.inf)
    return found


def _phases(
    communication: CommunicationBytes, forward_part: float
) -> tuple[tuple[float, Traffic], tuple[float, Traffic]]:
    """Part of the compute and what is sent meanwhile."""
    behind_backward = communication.backward + communication.gradients
    return (forward_part, communication.forward), (1 - forward_part, behind_backward)
