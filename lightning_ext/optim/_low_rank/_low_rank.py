"""What all optimizers with moments in a subspace have in common.

Source: Zhao et al. 2024 (GaLore, arXiv:2403.03507), Algorithm 2, and its authors' code, by which
    groups say which parameters have a subspace.
Differs: what is no matrix, or no larger than the rank, goes to AdamW; states are tensors alone;
    subspaces are looked for in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional
from lightning_ext.optim._low_rank._checks import (
    RANGES,
    check_low_rank_group,
    warn_of_groups,
    warn_without_subspace,
)
from lightning_ext.optim._low_rank._matrix_update import Form, whole_update
from lightning_ext.optim._low_rank._others import step_others
from lightning_ext.optim._low_rank._owners import is_mine, owners_of
from lightning_ext.optim._low_rank._saved import (
    OWN,
    Matrix,
    refuse_another,
    saved_states,
    take_states,
)
from lightning_ext.optim._low_rank._states import (
    STREAMS,
    Turn,
    empty_schedule,
    layout_of,
    new_state,
)
from lightning_ext.optim._low_rank._weights import (
    moved,
    moved_by_lengths,
    read_rows,
    rows_of,
    start_lengths,
    write_rows,
)
from lightning_ext.optim._matrix._owners import by_owners
from lightning_ext.optim._step._checks import check_group, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import count
from lightning_ext.optim._step._shards import placed_like

_FAMILY = "lightning_ext.optim._low_rank."


@checks_groups(RANGES)
class LowRank(Optimizer):
    """An optimizer whose moments of matrices live in subspaces; its formula is its ``form``.

    Args:
        params: parameters or groups.
        defaults: settings of groups.
    """

    batch_rule = "sde"
    form: ClassVar[Form] = "galore"
    splits_lengths: ClassVar[bool] = False
    _said: bool | None = None  # while it is made: whether a group says its algorithm

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        own = next(x.__name__ for x in type(self).__mro__ if x.__module__.startswith(_FAMILY))
        more = {"algorithm": "low_rank", "method": own, "decoupled_weight_decay": True}
        self._said = False
        super().__init__(params, defaults | more)
        plain, self._said = not self._said, None
        warn_of_groups(type(self).__name__, self.param_groups, plain=plain)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group.

        Args:
            param_group: as in ``torch.optim.Optimizer``; ``algorithm`` is "low_rank" or "adamw".

        Raises:
            ValueError: if a setting is out of range.
            TypeError: if a parameter is complex.
        """
        said = isinstance(param_group, dict) and "algorithm" in param_group
        super().add_param_group(param_group)
        check_group(self, len(self.param_groups) - 1, self.param_groups[-1], RANGES)
        check_low_rank_group(type(self).__name__, self.param_groups[-1])
        if self._said is None:
            warn_of_groups(type(self).__name__, self.param_groups[-1:], plain=False)
        else:
            self._said |= said

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        loss = closure_loss(closure)
        found, first = matrices(self), not self.state
        for index, group in enumerate(self.param_groups):
            params = [x for x in group["params"] if x.grad is not None]
            _check_new(self, index, group, params)
            step_matrices(self, group, [found[x] for x in params if x in found])
            others = [x for x in params if x not in found]
            if others:
                step_others(self, group, others)
        if first and not found:
            warn_without_subspace(type(self).__name__, self.param_groups)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state; all ranks must call where parameters are split.

        Returns:
            As ``torch.optim.Optimizer``, of tensors alone: what an owner keeps is split along
            dimension 0 over the ranks of its parameter.
        """
        return saved_states(self, super().state_dict(), matrices(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; all ranks must call where parameters are split.

        Args:
            state_dict: what ``state_dict`` returned, of any number of ranks. Formats of states stay
                as this optimizer has them.

        Raises:
            ValueError: if it is that of another optimizer.
        """
        refuse_another(self, state_dict)
        own = [{name: x[name] for name in OWN if name in x} for x in self.param_groups]
        steps = {i: {"step": x["step"]} for i, x in state_dict["state"].items() if "step" in x}
        super().load_state_dict({**state_dict, "state": steps})
        for group, values in zip(self.param_groups, own, strict=True):
            group.update(values)
        take_states(self, state_dict, matrices(self))


def matrices(optimizer: Optimizer) -> dict[Tensor, Matrix]:
    """Return the parameters that have a subspace, in order.

    Args:
        optimizer: one of the family.
    """
    groups = [[(x, layout_of(x, g)) for x in g["params"]] for g in optimizer.param_groups]
    pairs, owners = list(chain.from_iterable(groups)), owners_of(groups)
    chosen = [i for i, (_, layout) in enumerate(pairs) if layout is not None]
    found = {}
    for turn, i in enumerate(chosen):
        param, layout = pairs[i]
        if layout is not None:
            found[param] = Matrix(param, layout, Turn(i, turn, len(chosen)), owners[i])
    return found


def step_matrices(optimizer: LowRank, group: dict[str, Any], some: list[Matrix]) -> None:
    """Do a step of the matrices of a group.

    Args:
        optimizer: whose states they are.
        group: their settings.
        some: with gradients.
    """
    if not some:
        return
    states = [_state(optimizer, x) for x in some]
    torch._foreach_add_([x["step"] for x in states], 1.0)
    grads = [_gradient(x, maximize=group["maximize"]) for x in some]
    weights, lengths = [], []
    for i, x in enumerate(some):
        if optimizer.splits_lengths:
            weights.append(read_rows(x.param, x.layout.dtype))
            grads[i], by_length = functional.weight_norm_gradients(weights[i], grads[i])
            lengths.append(by_length)

    def make(places: Sequence[int], wholes: Iterable[Tensor]) -> list[Tensor]:
        pairs = ((states[i], some[i], whole) for i, whole in zip(places, wholes, strict=True))
        return [
            whole_update(state, x.layout, whole, group, optimizer.form, x.turn)
            for state, x, whole in pairs
        ]

    updates = by_owners(make, [x.param for x in some], grads, [x.owner for x in some])
    for i, (x, state) in enumerate(zip(some, states, strict=True)):
        if optimizer.splits_lengths:
            new = moved_by_lengths(weights[i], updates[i], lengths[i], state, group)
        else:
            new = moved(read_rows(x.param, x.layout.dtype), updates[i], group)
        stream = x.turn.stream + STREAMS - 1
        write_rows(x.param, new, seed=group["seed"], step=int(state["updates"]), stream=stream)
        state["updates"] += 1


def _state(optimizer: LowRank, matrix: Matrix) -> dict[str, Tensor]:
    state = optimizer.state[matrix.param]
    if not state:
        state["step"] = count(matrix.param)
        state.update(empty_schedule(matrix.layout.gap))
        if optimizer.splits_lengths:
            state.update(start_lengths(matrix.param))
        if is_mine(matrix.param, matrix.owner):
            state.update(new_state(matrix.layout))
    return state


def _gradient(matrix: Matrix, *, maximize: bool) -> Tensor:
    param = matrix.param
    grad = rows_of(placed_like(param.grad, param)).to(matrix.layout.dtype)  # type: ignore[arg-type]  # it has one
    return -grad if maximize else grad


def _check_new(
    optimizer: Optimizer, index: int, group: dict[str, Any], params: list[Tensor]
) -> None:
    """Refuse what cannot be updated, where it is new."""
    if any(x.grad is not None and x.grad.layout is not torch.strided for x in params):
        raise TypeError(
            f"{type(optimizer).__name__} got a sparse gradient; it needs dense ones. Hint:"
            " nn.Embedding(sparse=False), or torch.optim.SparseAdam for that parameter"
        )
    if not all(optimizer.state[x] for x in params):
        check_group(optimizer, index, group, RANGES)
