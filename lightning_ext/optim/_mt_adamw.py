"""MT-AdamW: AdamW for one task at a time, whose draws and gradient scales leave no bias.

Source: Li et al. 2023 (Uni-Perceiver v2, arXiv:2211.09808), Task-Balanced Gradient Normalization.
Differs: see ``functional.mt_adamw_update``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional
from lightning_ext.optim._low_bit._moments import StateDtype, first_moment, second_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._shards import reduction
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": first_moment, "exp_avg_sq": second_moment}


@saves_moments(_STATES)
@checks_groups()
class MTAdamW(Optimizer):
    r"""AdamW for steps each of which is of one task k, drawn with a probability s_k.

    .. math::
        g \leftarrow \omega_k \frac{g}{\|g\|}, \qquad
        m \leftarrow \beta_1 m + (1 - \beta_1) \frac{g}{s_k}, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) \frac{g^2}{s_k}

    So how often a task is drawn and how much it counts are two things. ‖g‖ is that over all
    parameters, groups and shards.

    Say the task of a step before it, for instance in ``training_step``, on all ranks alike:
    ``self.optimizers().set_task(name)``; it holds until another one is set. All micro-batches of a
    step are of one task.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1), shares of what stays; the paper writes 1 − β.
        eps: ε.
        weight_decay: λ, decoupled.
        tasks: of each name the probability s, above 0, and the weight ω, at least 0; the
            probabilities of all sum up to 1. Without it there is one task, and this is AdamW of
            gradients of norm 1.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> tasks = {"caption": (0.25, 1.0), "detect": (0.75, 2.0)}
        >>> optimizer = MTAdamW([w], lr=0.1, weight_decay=0.0, tasks=tasks)
        >>> optimizer.set_task("caption")
        >>> w.grad = torch.tensor([3.0, -4.0])
        >>> optimizer.step()
        >>> w.data
        tensor([0.8000, 1.2000])
    """

    batch_rule = "sde"
    normalizes_gradient = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        tasks: Mapping[str, tuple[float, float]] | None = None,
        state_dtype: StateDtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        checked = _checked(tasks)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "tasks": checked,
            "task": next(iter(checked)) if len(checked) == 1 else "",
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        check_groups(self)

    def set_task(self, name: str) -> None:
        """Say which task the gradients of the next steps are of.

        Args:
            name: one of ``tasks``.

        Raises:
            ValueError: if there is no such task.
        """
        tasks = self.param_groups[0]["tasks"]
        if name not in tasks:
            known = ", ".join(map(repr, tasks)) or "none: give MTAdamW(tasks=...)"
            raise ValueError(f"MTAdamW was told of the task {name!r}; there are {known}")
        for group in self.param_groups:
            group["task"] = name

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first. It may set the task.

        Returns:
            What the closure returns.

        Raises:
            ValueError: if there are several tasks and none was set.
            RuntimeError: if ranks step for different tasks; looked at in the first ten steps and
                in every hundredth.
        """
        loss = closure_loss(closure)
        probability, weight = self._present()
        found = [(rows(self, group, _STATES), group) for group in self.param_groups]
        grads = [x for part, _ in found for x in part.grads]
        reduce = reduction([x for part, _ in found for x in part.whole])
        whole = functional.total_sq_norm(grads, reduce=reduce, foreach=True)
        task = {"probability": probability, "weight": weight, "sq_norm": whole}
        for part, group in found:
            names = ("lr", "betas", "eps", "weight_decay", "maximize")
            settings = {name: group[name] for name in names} | task
            update(functional.mt_adamw_update_, functional.mt_adamw_update, part, settings, group)
        return loss

    def _present(self) -> tuple[float, float]:
        """Probability and weight of the task of this step."""
        tasks, name = (self.param_groups[0][key] for key in ("tasks", "task"))
        if not tasks:
            return 1.0, 1.0
        if name not in tasks and all(_at_rest(group["lr"]) for group in self.param_groups):
            return 1.0, 1.0  # how checkpoints make states
        if name not in tasks:
            raise ValueError(
                f"MTAdamW took a step of none of its tasks, {', '.join(map(repr, tasks))}. Hint:"
                " optimizer.set_task(name) before it, for instance"
                " self.optimizers().set_task(name) in training_step"
            )
        if len(tasks) > 1:
            self._check_ranks(list(tasks), name)
        probability, weight = tasks[name]
        return probability, weight

    def _check_ranks(self, tasks: list[str], name: str) -> None:
        """Refuse tasks that differ over ranks, in the first steps and now and then."""
        taken = getattr(self, "_taken", 0)
        self._taken = taken + 1
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if taken >= 10 and taken % 100:
            return
        place, device = tasks.index(name), self.param_groups[0]["params"][0].device
        bounds = torch.tensor([place, -place], device=device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        last, first = bounds.tolist()
        if last != -first:
            raise RuntimeError(
                f"MTAdamW takes a step of {name!r} on this rank, and ranks differ: they have tasks"
                f" from {tasks[-first]!r} to {tasks[last]!r}. A step is of one task on all ranks."
                " Hint: draw it from a generator that all ranks seed alike"
            )


def _at_rest(lr: float | Tensor) -> bool:
    return bool(lr == 0)


def _checked(tasks: Mapping[str, tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    """Tasks as plain numbers."""
    if tasks is not None and not isinstance(tasks, Mapping):
        raise TypeError(
            f"MTAdamW got tasks={tasks!r}; give a dict of (probability, weight) by name"
        )
    given = {} if tasks is None else dict(tasks)
    for name, value in given.items():
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(
                f"MTAdamW got {value!r} for the task {name!r}; give (probability, weight)"
            )
        if not 0 < value[0] <= 1 or not 0 <= value[1] < math.inf:
            raise ValueError(
                f"MTAdamW got {value!r} for the task {name!r}; the probability must lie in (0, 1]"
                " and the weight be finite and at least 0"
            )
    total = sum(value[0] for value in given.values())
    if given and not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"MTAdamW got tasks whose probabilities sum up to {total:g}; they must to 1"
        )
    return {name: (float(value[0]), float(value[1])) for name, value in given.items()}
