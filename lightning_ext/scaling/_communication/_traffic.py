"""Bytes and messages that one rank sends, by one convention for every collective.

Source: derived. Every part of a buffer goes from the rank that has it straight to the rank that
    needs it. A ring sends as many bytes in all, over other links and in other messages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_ext.scaling._validate import require_count

# What goes to each of the others: part of the input (1/size or all of it), and how many times.
_TO_OTHERS = {
    "all_gather": (False, 1),
    "all_reduce": (True, 2),
    "all_to_all": (True, 1),
    "broadcast": (False, 1),
    "reduce_scatter": (True, 1),
    "scatter": (True, 1),
}
_FROM_ROOT = frozenset({"broadcast", "scatter"})
_TO_ROOT = frozenset({"gather", "reduce"})
COLLECTIVES = (*sorted([*_TO_OTHERS, *_TO_ROOT]), "send")


@dataclass(frozen=True)
class Traffic:
    """What one rank sends: inside its node, and to ranks of other nodes.

    Traffics add up, and are multiplied with a number of times.

    Args:
        intra_bytes: bytes to ranks of the same node.
        inter_bytes: bytes to ranks of other nodes.
        intra_messages: messages to ranks of the same node.
        inter_messages: messages to ranks of other nodes.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if one is below 0.

    Example:
        >>> (Traffic(100, 200, 1, 2) + 3 * Traffic(inter_bytes=5, inter_messages=1)).inter_bytes
        215
    """

    intra_bytes: int = 0
    inter_bytes: int = 0
    intra_messages: int = 0
    inter_messages: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be counted."""
        for name, value in vars(self).items():
            require_whole(name, value)

    @property
    def total_bytes(self) -> int:
        """Bytes to anybody."""
        return self.intra_bytes + self.inter_bytes

    @property
    def total_messages(self) -> int:
        """Messages to anybody."""
        return self.intra_messages + self.inter_messages

    def __add__(self, other: Traffic) -> Traffic:
        """Return both together."""
        if not isinstance(other, Traffic):
            return NotImplemented
        return Traffic(
            self.intra_bytes + other.intra_bytes,
            self.inter_bytes + other.inter_bytes,
            self.intra_messages + other.intra_messages,
            self.inter_messages + other.inter_messages,
        )

    def __mul__(self, times: int) -> Traffic:
        """Return the same, several times."""
        if isinstance(times, bool) or not isinstance(times, int):
            return NotImplemented
        return Traffic(*(value * times for value in vars(self).values()))

    __rmul__ = __mul__


def collective_traffic(
    kind: str,
    input_bytes: int,
    *,
    size: int,
    local: int,
    root: bool = True,
    peer_local: bool | None = None,
) -> Traffic:
    """Return what one rank sends in a collective.

    ==============  ==========================================================================
    kind            sent, of ``input_bytes`` on this rank
    ==============  ==========================================================================
    all_gather      all of it to each other rank
    all_reduce      1/size of it to each other rank twice: a reduce-scatter and an all-gather
    all_to_all      1/size of it to each other rank
    broadcast       by the root, all of it to each other rank; by the others nothing
    gather          by all but the root, all of it to the root
    reduce          by all but the root, all of it to the root
    reduce_scatter  1/size of it to each other rank
    scatter         by the root, 1/size of it to each other rank; by the others nothing
    send            all of it to one rank
    ==============  ==========================================================================

    One message goes to each addressee, two in an all-reduce; where there are no bytes, none goes.
    An all-reduce may cut its buffer between bytes: 1/size of it is rounded up to a whole number of
    them. The others are cut in equal parts by definition, and refuse what does not divide;
    :func:`exchange_traffic` is for parts of different sizes.

    Args:
        kind: one of ``COLLECTIVES``.
        input_bytes: of the buffer that this rank puts in; for all-gather and gather its own part,
            for scatter all parts of the root.
        size: ranks of the group.
        local: those of them on the node of this rank, which counts; in [1, size].
        root: whether this rank is the root, in kinds that have one.
        peer_local: whether the only rank that this one sends to, the root of reduce and gather or
            the addressee of send, is on its node. ``None`` where ``local`` says it, being 1 or
            ``size``.

    Returns:
        The traffic of this rank.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if the kind is unknown, a number is out of range, the input does not divide, or
            ``peer_local`` is needed.

    Example:
        >>> collective_traffic("all_gather", 100, size=4, local=2)
        Traffic(intra_bytes=100, inter_bytes=200, intra_messages=1, inter_messages=2)
    """
    _check_collective(kind, input_bytes, size, local)
    if size == 1 or input_bytes == 0 or (kind in _FROM_ROOT and not root):
        return Traffic()
    if kind == "send" or kind in _TO_ROOT:
        if kind != "send" and root:
            return Traffic()
        return _to_one(kind, input_bytes, size, local, peer_local)
    divided, times = _TO_OTHERS[kind]
    part = _part(kind, input_bytes, size) if divided else input_bytes
    inside, outside = times * (local - 1), times * (size - local)
    return Traffic(part * inside, part * outside, inside, outside)


def exchange_traffic(
    bytes_to: Sequence[int], *, rank: int, local_ranks: Collection[int]
) -> Traffic:
    """Return what one rank sends where each other rank gets a part of its own size.

    Args:
        bytes_to: bytes for each rank of the group, in their order. What a rank has for itself does
            not count, and a rank that gets no bytes gets no message.
        rank: of this one in the group.
        local_ranks: ranks of the group on the node of this one, with or without it.

    Returns:
        The traffic of this rank.

    Raises:
        TypeError: if a number of bytes is not an integer.
        ValueError: if one is below 0, or a rank is not in the group.

    Example:
        >>> exchange_traffic([10, 0, 30, 40], rank=0, local_ranks={0, 1})
        Traffic(intra_bytes=0, inter_bytes=70, intra_messages=0, inter_messages=2)
    """
    for index, count in enumerate(bytes_to):
        require_whole(f"bytes_to[{index}]", count)
    for one in (rank, *local_ranks):
        if not 0 <= one < len(bytes_to):
            raise ValueError(f"rank {one} is not in a group of {len(bytes_to)}, the parts given")
    others = [(n, to in local_ranks) for to, n in enumerate(bytes_to) if n and to != rank]
    inside = [n for n, is_local in others if is_local]
    outside = [n for n, is_local in others if not is_local]
    return Traffic(sum(inside), sum(outside), len(inside), len(outside))


def require_whole(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}={value} is not allowed; it must be at least 0")


def _check_collective(kind: str, input_bytes: int, size: int, local: int) -> None:
    if kind not in COLLECTIVES:
        raise ValueError(f"kind={kind!r} is unknown; it must be one of {', '.join(COLLECTIVES)}")
    require_whole("input_bytes", input_bytes)
    require_count("size", size)
    require_count("local", local)
    if local > size:
        raise ValueError(
            f"local={local} is more than size={size}; it counts the ranks of the group that share "
            "a node with this one"
        )


def _to_one(kind: str, input_bytes: int, size: int, local: int, peer_local: bool | None) -> Traffic:
    if peer_local is None:
        if 1 < local < size:
            raise ValueError(
                f"{kind} goes to one rank, and {local} of {size} ranks share the node: "
                "say with peer_local whether it is one of them"
            )
        peer_local = local == size
    return Traffic(input_bytes, 0, 1, 0) if peer_local else Traffic(0, input_bytes, 0, 1)


def _part(kind: str, input_bytes: int, size: int) -> int:
    if kind != "all_reduce" and input_bytes % size:
        raise ValueError(
            f"input_bytes={input_bytes} of {kind} cannot be cut in {size} equal parts; "
            "exchange_traffic takes parts of different sizes"
        )
    return -(-input_bytes // size)
