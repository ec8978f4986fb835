"""Gravity: momentum of gradients that are bounded by the largest of their tensor.

Source: Bahrami and Pouriyan Zadeh 2021 (Gravity, arXiv:2101.09192), the algorithm.
Differs: see ``functional.gravity_update``. The first velocities are drawn from a seed, for each
    parameter by itself, and are 0 where the rate is.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional
from lightning_ext.optim._low_bit._moments import Moment, StateDtype, first_moment, moment_from
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import AT_LEAST_0, SHARE, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._shards import largest, local_part, split_as
from lightning_ext.optim._step._update import update

_RANGES = {"alpha": AT_LEAST_0, "beta": SHARE}


@saves_moments({"velocity": first_moment})
@checks_groups(_RANGES)
class Gravity(Optimizer):
    r"""Steps by an average of gradients, of which the largest of a tensor are held back.

    .. math::
        M = \frac{1}{\max |g|}, \quad \zeta = \frac{g}{1 + (g / M)^2}, \quad
        \hat\beta = \frac{\beta t + 1}{t + 2}, \quad
        V \leftarrow \hat\beta V + (1 - \hat\beta) \zeta, \quad
        w \leftarrow w - \mathrm{lr}\, V

    with t = 0 at the first step and V₀ ~ N(0, α/lr). Under sharding the largest is that of the
    whole parameter, and V₀ the part of one draw.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        alpha: α, about what every weight moves at random by the velocities that it starts with.
            V₀ is drawn for the rate that schedules begin from (``initial_lr``), without a scheduler
            for that of the step, and is 0 where that is; for both as ``BatchScaling`` scales them.
        beta: β in [0, 1).
        seed: of V₀; a group may have its own.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = Gravity([w], lr=1.0, alpha=0.0)
        >>> w.grad = torch.tensor([1.0, 2.0])
        >>> optimizer.step()
        >>> w.data  # M = 1/2
        tensor([-0.1000, -0.0588])
    """

    batch_rule = "linear"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        alpha: float = 0.01,
        beta: float = 0.9,
        *,
        seed: int = 0,
        state_dtype: StateDtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "seed": seed,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
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
            states = {"velocity": partial(self._first_velocity, group)}
            update(
                functional.gravity_update_,
                functional.gravity_update,
                rows(self, group, states, _RANGES),
                {name: group[name] for name in ("lr", "beta", "maximize")},
                group,
                reduce=largest,
            )
        return loss

    def _first_velocity(self, group: dict[str, Any], param: Tensor) -> Moment:
        """A draw that depends on nothing but the seed and the parameter's place."""
        params = chain.from_iterable(x["params"] for x in self.param_groups)
        place = next(i for i, x in enumerate(params) if x is param)
        word = functional.random_bits(1, seed=group["seed"], stream=place, device="cpu")
        draw = torch.Generator().manual_seed(int(word))
        # On the CPU and in float32, so that it is the same on all devices and for all dtypes.
        whole = torch.randn(param.shape, generator=draw, dtype=torch.float32, device="cpu")
        # A schedule may begin near 0; V₀ of that rate would move weights far once it has grown.
        rate = float(group.get("initial_lr", 0.0)) or float(group["lr"])
        velocity = split_as(whole * (group["alpha"] / rate if rate else 0.0), param)
        return moment_from(local_part(velocity), param, group, signed=True)
