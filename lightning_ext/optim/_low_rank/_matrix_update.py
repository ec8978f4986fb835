"""What one rank does for a whole matrix: look for its subspace where it is time, and update in it.

Source: see ``functional.low_rank_update``; Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296) for the
    lazy refresh.
Differs: matrices take turns. A gradient of zeros, or one that is not finite, gives no subspace; the
    next one does.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ext import functional
from lightning_ext.optim._low_rank._states import (
    MEMORY,
    Layout,
    Schedule,
    State,
    Turn,
    read_basis,
    read_moments,
    read_schedule,
    write_basis,
    write_moments,
    write_schedule,
)

Form = Literal["galore", "fira", "apollo"]  # of `functional.low_rank_update`
_UPDATE_SETTINGS = {
    "norm_growth": "gamma",
    "scale": "scale",
    "scale_type": "per",
    "scale_front": "scale_front",
    "alpha_in_residual": "alpha_in_residual",
}


def whole_update(
    state: State, layout: Layout, grad: Tensor, group: dict[str, Any], form: Form, turn: Turn
) -> Tensor:
    """Return what a matrix moves by for a unit of its rate, and keep its new states.

    Args:
        state: of the matrix; its count includes this step.
        layout: of the states.
        grad: the matrix's gradient, shape ``layout.shape``.
        group: its settings.
        form: of ``functional.low_rank_update``.
        turn: its place.
    """
    schedule = before = read_schedule(state)
    if schedule.left <= 0:
        schedule = _refreshed(state, layout, grad, group, schedule, turn)
    basis = _basis(state, layout, group, schedule, turn)
    names: dict[str, Any] = {y: group[x] for x, y in _UPDATE_SETTINGS.items() if x in group}
    mean, square = read_moments(state, layout)
    update, *moments, norm = functional.low_rank_update(
        grad,
        basis,
        mean,
        square,
        state["step"],
        state.get("update_norm"),
        form=form,
        betas=group["betas"],
        eps=group["eps"],
        **names,
    )
    step = schedule.steps
    write_moments(state, layout, moments, seed=group["seed"], step=step, stream=turn.stream + 1)
    if norm is not None:
        state["update_norm"].copy_(norm)
    write_schedule(state, schedule._replace(left=max(schedule.left - 1, 0)), before)
    return update


def _basis(
    state: State, layout: Layout, group: dict[str, Any], schedule: Schedule, turn: Turn
) -> Tensor:
    if layout.projection is not None:
        return read_basis(state, layout)
    return functional.gaussian_projection(
        *layout.basis,
        seed=group["seed"],
        step=schedule.refreshes,
        stream=turn.stream,
        device=layout.device,
        dtype=layout.dtype,
    )


def _refreshed(
    state: State,
    layout: Layout,
    grad: Tensor,
    group: dict[str, Any],
    schedule: Schedule,
    turn: Turn,
) -> Schedule:
    """Keep a new subspace, and return when the next one is due."""
    if layout.projection is not None:
        # The only number that a step waits for; decompositions wait for their errors anyway.
        size = float(grad.abs().amax())
        if not 0 < size < math.inf:
            return schedule
        schedule = _take_subspace(state, layout, grad, group, schedule, turn)
    refreshes = schedule.refreshes + 1
    first = refreshes == 1 and group.get("spread_refresh", False)
    left = max(1, schedule.gap * (turn.turn + 1) // turn.turns) if first else schedule.gap
    return schedule._replace(left=left, refreshes=refreshes)


def _take_subspace(
    state: State,
    layout: Layout,
    grad: Tensor,
    group: dict[str, Any],
    schedule: Schedule,
    turn: Turn,
) -> Schedule:
    previous = read_basis(state, layout) if schedule.refreshes else None
    basis = functional.gradient_subspace(
        grad,
        layout.rank,
        method=group["subspace"],
        previous=previous,
        seed=group["seed"],
        step=schedule.refreshes,
        stream=turn.stream,
    )
    write_basis(state, basis, layout)
    if not layout.lazy or previous is None:
        return schedule
    similarity = functional.subspace_similarity(basis, previous).to(layout.dtype)
    state["similarities"].copy_(torch.cat([state["similarities"][1:], similarity.view(1)]))
    seen = state["similarities"][-min(schedule.refreshes, MEMORY) :]
    gap = functional.lazy_refresh_gap(
        seen, schedule.gap, threshold=group["cos_threshold"], memory=MEMORY
    )
    return schedule._replace(gap=gap)
