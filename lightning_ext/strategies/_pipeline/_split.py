"""Which layers make a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ext.scaling import balanced_split

Split = Literal["uniform", "params", "time"] | Sequence[int]


def first_layers(
    members: Sequence[nn.Module], num_stages: int, split: Split, seconds: Sequence[float] = ()
) -> list[int]:
    """Index of the first layer of each stage.

    Args:
        members: Layers in order.
        num_stages: How many stages they are split into.
        split: By their number, their parameters, their time, or the first layers of all stages but
            the first.
        seconds: Of each layer, for ``"time"``.

    Raises:
        MisconfigurationException: There are fewer layers than stages, or as given they are not in
            order.
    """
    if len(members) < num_stages:
        raise MisconfigurationException(
            f"{num_stages} stages cannot be made of {len(members)} layer(s); allowed is one in a"
            " stage at least. Hint: fewer devices or stages_per_rank, or finer pipeline_layers()."
        )
    if split == "uniform":
        return balanced_split([1.0] * len(members), num_stages)
    if split == "params":
        sizes = [float(sum(p.numel() for p in one.parameters())) for one in members]
        return balanced_split(sizes, num_stages)
    if split == "time":
        return balanced_split(seconds, num_stages)
    return _given([0, *map(int, split)], len(members), num_stages)


def _given(starts: list[int], layers: int, num_stages: int) -> list[int]:
    if len(starts) != num_stages or starts[-1] >= layers:
        raise MisconfigurationException(
            f"split={starts[1:]} does not make {num_stages} stages of {layers} layers; allowed are"
            f" {num_stages - 1} ascending numbers from 1 to {layers - 1}: the first layers of all"
            " stages but the first. Hint: split='params'."
        )
    return starts
