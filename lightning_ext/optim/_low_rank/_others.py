"""AdamW for what has no subspace: vectors, small matrices, and what groups send to it.

Source: Zhang et al. 2024 (Q-GaLore, arXiv:2407.08296), whose moments are of few bits everywhere.
"""

from __future__ import annotations

from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext import functional, kernels
from lightning_ext.optim._low_bit._moments import first_moment, second_moment
from lightning_ext.optim._low_rank._states import STREAMS
from lightning_ext.optim._low_rank._weights import is_coded, read_rows, write_rows
from lightning_ext.optim._step._rows import Rows, count, rows
from lightning_ext.optim._step._update import update

OTHER_MOMENTS = {"exp_avg": first_moment, "exp_avg_sq": second_moment}
UPDATES = "updates"  # of a weight in codes: its count of steps in host memory, for random bits
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize")


def step_others(optimizer: Optimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """Do a step of AdamW.

    Args:
        optimizer: whose states they are.
        group: their settings.
        params: with gradients.
    """
    for param in params:
        if not optimizer.state[param]:
            optimizer.state[param].update(_new_state(param, group))
    found = rows(optimizer, {**group, "params": params}, OTHER_MOMENTS)
    found = found._replace(place=_free_place(optimizer, group))
    coded = [i for i, x in enumerate(params) if is_coded(x)]
    found = _in_numbers(found, coded)
    settings = {name: group[name] for name in _SETTINGS}
    update(kernels.adamw_update_, functional.adamw_update, found, settings, group)
    if coded:
        _write(optimizer, group, found, coded)


def _new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {name: make(param, group) for name, make in OTHER_MOMENTS.items()}
    if is_coded(param):
        made[UPDATES] = torch.zeros((), dtype=torch.int64, device="cpu")
    return made | {"step": count(param)}


def _free_place(optimizer: Optimizer, group: dict[str, Any]) -> int:
    """Where a group's streams of random bits begin, behind those of all matrices."""
    before = takewhile(lambda x: x is not group, optimizer.param_groups)
    return sum(len(x["params"]) for x in chain(optimizer.param_groups, before))


def _in_numbers(found: Rows, coded: list[int]) -> Rows:
    """The same with numbers in the place of codes."""
    params, grads = list(found.params), list(found.grads)
    for i in coded:
        wide = torch.promote_types(params[i].dtype, torch.float32)
        params[i] = read_rows(params[i], wide).view_as(grads[i])
        grads[i] = grads[i].to(wide)
    return found._replace(params=params, grads=grads)


def _write(optimizer: Optimizer, group: dict[str, Any], found: Rows, coded: list[int]) -> None:
    """Round numbers to codes again, by the bits that a matrix in that place would have."""
    places = {x: i for i, x in enumerate(chain(*(g["params"] for g in optimizer.param_groups)))}
    for i in coded:
        param = found.whole[i]
        updates = optimizer.state[param][UPDATES]
        stream = STREAMS * places[param] + STREAMS - 1
        bits = {"seed": group["seed"], "step": int(updates), "stream": stream}
        write_rows(param, found.params[i], **bits)
        updates += 1
