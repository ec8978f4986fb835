"""CAME: factored second moments, and shorter steps where momentum and gradient disagree.

Source: Luo et al. 2023 (CAME, arXiv:2307.02047), Algorithm 2; the form for vectors and the default
    rate from the authors' code.
Differs: see ``functional.came_update``. Under sharding it is the update of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.functional import FactoredState
from lightning_ext.optim._low_bit._moments import StateDtype, WeightRounding, first_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import ABOVE_0, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._numbers import number_dtype, restore_numbers
from lightning_ext.optim._step._rows import Rows, rows, zeros
from lightning_ext.optim._step._shards import (
    Groups,
    check_rows_whole,
    local_part,
    split_over,
    zeros_like_rows,
)
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": first_moment}
_WIDE = (*FactoredState._fields, "exp_avg_sq")
_RANGES = {"clip_threshold": ABOVE_0}
_SETTINGS = ("lr", "betas", "eps", "clip_threshold", "weight_decay", "maximize")


@saves_moments(_STATES)
@checks_groups(_RANGES)
class CAME(Optimizer):
    r"""Adam's steps from means of rows and columns, damped where they are not to be trusted.

    .. math::
        \hat u = \mathrm{clip}_d\!\left(\frac{g}{\sqrt V}\right), \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1)\, \hat u, \qquad
        \theta \leftarrow (1 - \mathrm{lr}\,\lambda)\,\theta - \mathrm{lr}\,\frac{m}{\sqrt S}

    V is made of running means (β₂) of the rows and columns of g² + ε₁, S of those (β₃) of
    (û − m)² + ε₂, each as r cᵀ/mean(r); the clip is to an RMS of d. Of a matrix r × c it keeps m
    and 2(r + c) numbers. A convolution is the matrix (output channels, rest). What has no matrix,
    such as a bias, has a plain second moment and steps by m. There is no bias correction: the clip
    holds the first steps.

    Under sharding rows must be whole on a rank, as FSDP2 has them; means of rows are split as the
    parameter is, those of columns are the same on all ranks. Three small all-reduces a group and
    step.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry. The authors' code has 2e-4, and advises 0.5 to
            0.9 times the rate of AdamW.
        betas: β₁, β₂ and β₃, each in [0, 1). The authors take AdamW's for the first two, and of
            β₃ 0.9995 to 0.99995 with β₂ = 0.999, 0.99 to 0.999 with β₂ = 0.95.
        eps: ε₁ and ε₂.
        weight_decay: λ, decoupled.
        clip_threshold: d.
        state_dtype: format of m; that of the parameter where ``None``. Vectors and tensors of at
            most 4096 entries stay in float32, and so does all else that is kept.
        weight_rounding: of weights in bfloat16: at random, or with the error kept in an int8
            beside each ("compensated").
        seed: of what is rounded at random.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.
        fused: as in ``torch.optim``: ``None``, kernels on CUDA; ``True``, kernels or an error.

    Raises:
        ValueError: if a setting is out of range, or, at a step, rows are split over ranks.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = CAME([w], lr=0.1)
        >>> w.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> sorted((name, x.numel()) for name, x in optimizer.state[w].items())[:4]
        [('exp_avg', 6), ('res_col', 3), ('res_row', 2), ('sq_col', 3)]
    """

    batch_rule = "sde"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        state_dtype: StateDtype | None = None,
        weight_rounding: WeightRounding = "nearest",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        check_groups(self, _RANGES)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        loss = closure_loss(closure)
        for group in self.param_groups:
            check_rows_whole("CAME", group["params"])
            self._update(rows(self, group, _STATES, _RANGES), group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Args:
            state_dict: of an optimizer of the same groups.
        """
        super().load_state_dict(state_dict)
        for name in _WIDE:
            restore_numbers(self, state_dict, name)

    def _update(self, found: Rows, group: dict[str, Any]) -> None:
        kinds: dict[tuple[bool, Groups], list[int]] = {}
        for i, param in enumerate(found.whole):
            kinds.setdefault((param.dim() > 1, split_over(param)), []).append(i)
        settings = {name: group[name] for name in _SETTINGS}
        place = found.place
        for (is_matrix, _), chosen in kinds.items():
            part = _chosen(found, chosen, place)
            second = {
                id(local): _second(param, self.state[param])
                for local, param in zip(part.params, part.whole, strict=True)
            }
            how: dict[str, Any] = {"settings": settings, "group": group, "reduce": _summed}
            update(*_functions(second, is_matrix=is_matrix), part, **how)
            place += len(chosen)


def _chosen(found: Rows, places: list[int], place: int) -> Rows:
    columns = (found.whole, found.params, found.grads, found.steps, *found.states)
    whole, params, grads, steps, *states = ([x[i] for i in places] for x in columns)
    errors = None if found.errors is None else [found.errors[i] for i in places]
    return Rows(whole, params, grads, steps, states, errors, place)


def _functions(
    second: dict[int, FactoredState | Tensor], *, is_matrix: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The update of lists and that of one parameter, which find by themselves what is not m."""
    listed = kernels.came_update_ if is_matrix else kernels.came_vector_update_
    formula = functional.came_update if is_matrix else functional.came_vector_update

    def of_lists(params: list[Tensor], grads: Any, means: Any, steps: Any, **how: Any) -> Tensor:
        call: Any = listed
        found: Tensor = call(params, grads, means, [second[id(x)] for x in params], steps, **how)
        return found

    def of_one(param: Tensor, grad: Any, mean: Any, _: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        call: Any = formula
        old = second[id(param)]
        moved, mean, new = call(param, grad, mean, old, **how)
        pairs = [(old, new)] if isinstance(old, Tensor) else zip(old, new, strict=True)
        for x, y in pairs:
            x.copy_(y)
        return moved, mean

    return of_lists, of_one


def _second(param: Tensor, state: dict[str, Any]) -> FactoredState | Tensor:
    """What belongs to a parameter beside its momentum, made where it is missing."""
    if param.dim() < 2:
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = zeros(param).to(number_dtype(param))
        return local_part(state["exp_avg_sq"])
    if "sq_row" not in state:
        for kind in ("sq", "res"):
            state[f"{kind}_row"] = zeros_like_rows(param).to(number_dtype(param))
            state[f"{kind}_col"] = _zeros_like_columns(param)
    return FactoredState(*(local_part(state[name]).view(-1) for name in FactoredState._fields))


def _zeros_like_columns(param: Tensor) -> Tensor:
    """A zero for each column, shape (columns,), all of them on each rank."""
    zero = local_part(param).new_zeros(param.shape[1:].numel(), dtype=number_dtype(param))
    if not isinstance(param, DTensor):
        return zero
    mesh = param.device_mesh
    return DTensor.from_local(zero, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _summed(params: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """What adds up a vector over the ranks that split parameters alike; ``None`` if none does."""
    groups = split_over(params[0])
    if not groups:
        return None

    def reduce(sums: Tensor) -> Tensor:
        total = sums.clone()
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    return reduce
