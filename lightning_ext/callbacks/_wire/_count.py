"""What has been sent: one entry for each collective, and sums of them.

Source: the quantities of ``scaling.communication_bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_ext.scaling import CommunicationBytes, Traffic

Phase = Literal["forward", "backward", "other"]
_REDUCTIONS = ("all_reduce", "all_to_all", "reduce", "reduce_scatter")


class Sent(NamedTuple):
    """One collective, as this rank has taken part in it.

    Args:
        kind: One of ``scaling.COLLECTIVES``, such as ``"all_gather"``.
        phase: ``"forward"``, ``"backward"`` or ``"other"``.
        group_size: Ranks of its group.
        traffic: What this rank has sent.
    """

    kind: str
    phase: Phase
    group_size: int
    traffic: Traffic


@dataclass(frozen=True)
class WireCount:
    """The collectives of this rank, in their order.

    Args:
        sent: One entry for each.
    """

    sent: tuple[Sent, ...] = ()

    @property
    def total(self) -> Traffic:
        """All of it together."""
        return _sum(self.sent)

    @property
    def calls(self) -> int:
        """How many collectives there were, those by which this rank sent nothing included."""
        return len(self.sent)

    def by(self, what: Literal["kind", "phase", "group_size"]) -> dict[Any, Traffic]:
        """Sums by collective, by phase or by the size of the group, in the order of appearance."""
        found = dict.fromkeys(getattr(one, what) for one in self.sent)
        return {key: self.only(**{what: key}).total for key in found}

    def only(
        self, *, kind: str | None = None, phase: Phase | None = None, group_size: int | None = None
    ) -> WireCount:
        """Those of one collective, one phase, one size of group, or of all that are given."""
        asked = {"kind": kind, "phase": phase, "group_size": group_size}
        wanted = {name: value for name, value in asked.items() if value is not None}
        return WireCount(
            tuple(x for x in self.sent if all(getattr(x, n) == v for n, v in wanted.items()))
        )

    @property
    def parts(self) -> CommunicationBytes:
        """What ``scaling.communication_bytes`` speaks of: gathers, and reductions in backward.

        Reductions are all-reduces, reduces, reduce-scatters and all-to-alls.
        """
        return CommunicationBytes(
            forward=self.only(kind="all_gather", phase="forward").total,
            backward=self.only(kind="all_gather", phase="backward").total,
            gradients=_sum([x for x in self.sent if _is_gradient(x)]),
        )

    @property
    def rest(self) -> Traffic:
        """What is in no part: metrics, buffers, norms of gradients, activations."""
        return _sum([x for x in self.sent if not _is_gather(x) and not _is_gradient(x)])


def _is_gather(one: Sent) -> bool:
    return one.kind == "all_gather" and one.phase != "other"


def _is_gradient(one: Sent) -> bool:
    return one.kind in _REDUCTIONS and one.phase == "backward"


def _sum(sent: Sequence[Sent]) -> Traffic:
    return sum((one.traffic for one in sent), Traffic())
