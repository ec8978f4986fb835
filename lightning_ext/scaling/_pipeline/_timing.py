"""When each pass, gather and reduction of a pipeline starts and ends.

Source: derived. A pass starts when its rank is free, its input has arrived, and its stage is
    gathered; a forward pass needs that of the stage before, a backward pass that of the stage
    behind.
Differs: a model. A send never holds up its rank, nor another send; torch's 1F1B waits for a send
    together with the receipt that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_ext.scaling._pipeline._gathers import GATHER
from lightning_ext.scaling._pipeline._orders import Work


class PipelineAction(NamedTuple):
    """Something that a rank does, and when.

    Args:
        rank: pipeline rank.
        stage: of the whole pipeline.
        kind: "forward", "backward", "gather" or "reduce".
        micro_batch: of the batch; ``None`` for gathers and reductions.
        start_ms: since the start of the batch.
        end_ms: the same.
    """

    rank: int
    stage: int
    kind: str
    micro_batch: int | None
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a forward and backward pass of each stage, and of what is sent."""

    forward: Sequence[float]
    backward: Sequence[float]
    send: float
    gather: float
    reduce: float

    def of(self, work: Work) -> float:
        """Return the time of a pass."""
        return (self.forward if work.kind == "forward" else self.backward)[work.stage]


@dataclass
class _Rank:
    """Where a rank is in its list, and until when it and its network are busy."""

    todo: Sequence[tuple[int, Work | str]]
    done: int = 0
    free: float = 0.0
    network: float = 0.0
    gathered: dict[int, float] = field(default_factory=dict)


def time_actions(
    lists: Sequence[Sequence[tuple[int, Work | str]]], costs: Costs
) -> list[PipelineAction]:
    """Return all actions of all ranks, each rank's in the order of its list."""
    ranks = [_Rank(todo) for todo in lists]
    ended: dict[Work, float] = {}
    found: list[list[PipelineAction]] = [[] for _ in ranks]
    is_moving = True
    while is_moving:
        is_moving = False
        for index, rank in enumerate(ranks):
            while rank.done < len(rank.todo):
                action = _next(index, rank, len(ranks), ended, costs)
                if action is None:
                    break
                found[index].append(action)
                rank.done += 1
                is_moving = True
    return [action for actions in found for action in actions]


def _next(
    index: int, rank: _Rank, num_ranks: int, ended: dict[Work, float], costs: Costs
) -> PipelineAction | None:
    """Do the next action of a rank, or nothing where its input is not there yet."""
    stage, work = rank.todo[rank.done]
    if isinstance(work, str):
        # A gather needs the room that the last pass leaves, a reduction what it computed.
        start = max(rank.free, rank.network)
        rank.network = start + (costs.gather if work == GATHER else costs.reduce)
        if work == GATHER:
            rank.gathered[stage] = rank.network
        return PipelineAction(index, stage, work, None, start, rank.network)
    arrived = _arrival(work, num_ranks, ended, costs)
    if arrived is None:
        return None
    start = max(rank.free, arrived, rank.gathered.get(stage, 0.0))
    ended[work] = rank.free = start + costs.of(work)
    return PipelineAction(index, stage, work.kind, work.micro_batch, start, rank.free)


def _arrival(work: Work, num_ranks: int, ended: dict[Work, float], costs: Costs) -> float | None:
    """When the input of a pass is there; ``None`` while that is not known."""
    last = len(costs.forward) - 1
    if work.kind == "forward":
        if work.stage == 0:
            return 0.0
        before = work._replace(stage=work.stage - 1)
    elif work.stage == last:
        before = work._replace(kind="forward")
    else:
        before = work._replace(stage=work.stage + 1)
    if before not in ended:
        return None
    is_near = num_ranks == 1 or before.stage == work.stage
    return ended[before] + (0.0 if is_near else costs.send)
