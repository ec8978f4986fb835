"""The states of a matrix whose moments live in a subspace: tensors alone, in their formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.functional import Quantized, QuantizedState

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether entries may be negative
FORMATTED = (*MOMENTS, "projection")  # what may be in codes: of ``x`` in "int8", ``x.int8``
MEMORY = 5  # similarities that the lazy refresh looks at
STREAMS = 4  # of random bits that each matrix has: its projection's, two moments', its weight's
COUNTS = ("gap", "refresh_in", "refreshes", "updates")
_INT4_BLOCK = 256
State = dict[str, Tensor]


class Schedule(NamedTuple):
    """When a subspace is looked for, read from numbers in host memory.

    Attributes:
        gap: steps from one time to the next.
        left: steps to the next time; 0, now.
        refreshes: times so far.
        steps: steps so far.
    """

    gap: int
    left: int
    refreshes: int
    steps: int


class Layout(NamedTuple):
    """What the states of a matrix are made of.

    Attributes:
        shape: of the matrix, rows and columns.
        rank: of the subspace.
        state_dtype: format of the moments; ``None`` for plain tensors.
        projection: "float32", "int4", or ``None`` where there is no basis to keep.
        lazy: whether similarities are kept.
        limited: whether the norm of an update is kept.
        gap: the first one.
        dtype: of plain tensors and scales.
        device: of all but the schedule.
    """

    shape: tuple[int, int]
    rank: int
    state_dtype: str | None
    projection: str | None
    lazy: bool
    limited: bool
    gap: int
    dtype: torch.dtype
    device: torch.device

    @property
    def low(self) -> tuple[int, int]:
        """The shape of the moments."""
        return max(self.shape), self.rank

    @property
    def basis(self) -> tuple[int, int]:
        """The shape of the basis."""
        return self.rank, min(self.shape)


class Turn(NamedTuple):
    """The place of a matrix among those of an optimizer.

    Attributes:
        place: of the parameter among all.
        turn: of the matrix among those with a subspace.
        turns: how many there are.
    """

    place: int
    turn: int
    turns: int

    @property
    def stream(self) -> int:
        """The first of its streams of random bits."""
        return self.place * STREAMS


def empty_schedule(gap: int) -> State:
    """Return the schedule of a matrix that has made no step, as numbers in host memory.

    Args:
        gap: steps from one refresh to the next.
    """
    values = Schedule(gap, 0, 0, 0)
    return {
        name: torch.tensor(x, dtype=torch.int64, device="cpu")
        for name, x in zip(COUNTS, values, strict=True)
    }


def read_schedule(state: State) -> Schedule:
    """Return a matrix's schedule; nothing waits for a device."""
    return Schedule(*(int(state[name]) for name in COUNTS))


def write_schedule(state: State, schedule: Schedule, before: Schedule) -> None:
    """Keep what is new in a matrix's schedule."""
    for name, value, old in zip(COUNTS, schedule, before, strict=True):
        if value != old:
            state[name].fill_(value)


def new_state(layout: Layout) -> State:
    """Return the states of a matrix that has made no step, without its count and schedule.

    Args:
        layout: of the matrix.
    """
    how: dict[str, Any] = {"dtype": layout.dtype, "device": layout.device}
    found: State = {}
    for name, signed in MOMENTS.items():
        made = functional.zero_state(
            layout.low, layout.state_dtype or "float32", signed=signed, **how
        )
        found |= moment_parts(name, made)
    if layout.projection is not None:
        found |= basis_parts(torch.zeros(layout.basis, **how), layout)
    if layout.lazy:
        found["similarities"] = torch.zeros(MEMORY, **how)
    if layout.limited:
        found["update_norm"] = torch.zeros((), **how)
    return found


def read_moments(state: State, layout: Layout) -> list[Tensor]:
    """Return both moments as plain tensors.

    Args:
        state: of the matrix.
        layout: of the matrix.
    """
    return [functional.decode_state(moment_of(state, layout, name)) for name in MOMENTS]


def write_moments(
    state: State, layout: Layout, moments: Sequence[Tensor], *, seed: int, step: int, stream: int
) -> None:
    """Keep both moments in their format.

    Args:
        state: of the matrix.
        layout: of the matrix.
        moments: plain tensors.
        seed: of the bits that "bfloat16" is rounded by.
        step: likewise.
        stream: of the first; the second takes the next one.
    """
    for i, (name, new) in enumerate(zip(MOMENTS, moments, strict=True)):
        out = moment_of(state, layout, name)
        if out.format == "float32":
            out.codes.copy_(new)
            continue
        bits = {"seed": seed, "step": step, "stream": stream + i}
        functional.encode_state(new, out.format, signed=out.signed, out=out, **bits)


def moment_of(state: State, layout: Layout, name: str) -> QuantizedState:
    """Return a moment in its format, in the memory of the state.

    Args:
        state: of the matrix.
        layout: of the matrix.
        name: "exp_avg" or "exp_avg_sq".
    """
    format = layout.state_dtype or "float32"
    stem = f"{name}.{format}"
    if stem in state:
        codes, scales = state[stem], state[f"{stem}_scales"]
    else:
        codes = state[name]
        scales = codes.new_zeros(0, dtype=layout.dtype)
    return QuantizedState(codes, scales, format, layout.low, MOMENTS[name])


def read_basis(state: State, layout: Layout) -> Tensor:
    """Return the basis of the subspace, shape (rank, short side).

    Args:
        state: of the matrix.
        layout: of the matrix.
    """
    if "projection" in state:
        return state["projection"]
    codes, scales = state["projection.int4"], state["projection.int4_scales"]
    return functional.dequantize(
        Quantized(codes, scales, None, "int4", _INT4_BLOCK, layout.basis[1])
    )


def write_basis(state: State, basis: Tensor, layout: Layout) -> None:
    """Keep the basis in its format.

    Args:
        state: of the matrix.
        basis: shape (rank, short side).
        layout: of the matrix.
    """
    for name, part in basis_parts(basis, layout).items():
        state[name].copy_(part)


def basis_parts(basis: Tensor, layout: Layout) -> State:
    """Return what is kept of a basis.

    Args:
        basis: shape (rank, short side).
        layout: of the matrix.
    """
    if layout.projection == "float32":
        return {"projection": basis.to(layout.dtype)}
    found = functional.quantize(basis.to(layout.dtype), "int4", block_size=_INT4_BLOCK)
    return {"projection.int4": found.codes, "projection.int4_scales": found.scales}


def moment_parts(name: str, made: QuantizedState) -> State:
    """Return what is kept of a moment.

    Args:
        name: "exp_avg" or "exp_avg_sq".
        made: the moment.
    """
    if made.format in ("float32", "bfloat16"):
        return {name: made.codes}
    stem = f"{name}.{made.format}"
    return {stem: made.codes, f"{stem}_scales": made.scales}


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a matrix or convolution."""
    return len(param), math.prod(param.shape[1:])


def layout_of(param: Tensor, group: dict[str, Any]) -> Layout | None:
    """Return the layout of a parameter's states; ``None`` where it goes to AdamW.

    Args:
        param: the parameter; convolutions are matrices, a row for each output channel.
        group: its group.
    """
    if group["algorithm"] != "low_rank" or param.dim() < 2 or not param.numel():
        return None
    shape = matrix_shape(param)
    rank, short = group["rank"], min(shape)
    rank = max(1, int(rank * short)) if isinstance(rank, float) and rank < 1 else int(rank)
    if short <= rank:
        return None
    return Layout(
        shape,
        rank,
        group["state_dtype"],
        group.get("projection_dtype"),
        group.get("cos_threshold") is not None,
        group.get("norm_growth") is not None,
        group["update_proj_gap"],
        torch.promote_types(param.dtype, torch.float32),
        param.device,
    )
