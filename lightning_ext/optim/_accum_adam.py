"""AccumAdam: a step of Adam from every gradient, moments that advance with means of several.

Source: Wang et al. 2024 (arXiv:2410.11998), Appendix C, Algorithm 4, and its authors' code.
Differs: see ``functional.accum_adam_update``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional
from lightning_ext.optim._low_bit._moments import StateDtype, first_moment, second_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import Range, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._numbers import restore_numbers
from lightning_ext.optim._step._rows import Init, count, rows, zeros
from lightning_ext.optim._step._update import update

_STATES: dict[str, Init] = {
    "exp_avg": first_moment,
    "exp_avg_sq": second_moment,
    "accumulated_grad": zeros,
    "accumulated_steps": count,
}
_RANGES = {
    "every_n_steps": Range(lambda x: isinstance(x, int) and x >= 1, "be a whole number above 0")
}
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "every_n_steps")


@saves_moments(_STATES)
@checks_groups(_RANGES)
class AccumAdam(Optimizer):
    r"""Adam whose moments have the memory of a batch ``every_n_steps`` times as large.

    .. math::
        m' = \beta_1 m + (1 - \beta_1) g, \qquad v' = \beta_2 v + (1 - \beta_2) g^2, \qquad
        w \leftarrow w - \mathrm{lr}\, \frac{\hat m'}{\sqrt{\hat v'} + \epsilon}

    m and v themselves advance at every s-th step, with the mean of the s gradients: so where many
    workers share the samples, their small batches keep the moments of the whole. Each parameter
    has a window of its own, of the steps in which it had a gradient.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂ per s steps, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        every_n_steps: s; it is to grow with the workers. At 1 this is Adam.
        decoupled_weight_decay: True is the authors' AccumAdamW; False adds λw to the gradient.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = AccumAdam([w], lr=0.25, every_n_steps=2)
        >>> for grad in (2.0, -2.0, 4.0):
        ...     w.grad = torch.tensor([grad])
        ...     optimizer.step()
        >>> w.data, optimizer.state[w]["exp_avg"]  # down, up, and the moments know neither
        (tensor([0.8140]), tensor([0.]))
    """

    batch_rule = "sde"
    open_steps = "accumulated_steps"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        every_n_steps: int = 4,
        decoupled_weight_decay: bool = False,
        state_dtype: StateDtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "every_n_steps": every_n_steps,
            "decoupled_weight_decay": decoupled_weight_decay,
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
            update(
                functional.accum_adam_update_,
                functional.accum_adam_update,
                rows(self, group, _STATES, _RANGES),
                {name: group[name] for name in (*_SETTINGS, "maximize")},
                group,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Args:
            state_dict: of an optimizer of the same groups.
        """
        super().load_state_dict(state_dict)
        restore_numbers(self, state_dict, "accumulated_steps")
