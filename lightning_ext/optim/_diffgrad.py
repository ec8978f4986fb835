"""DiffGrad: Adam with a friction where a gradient stays as it is.

Source: Dubey et al. 2019 (diffGrad, arXiv:1909.11015), section III.
Differs: see ``functional.diffgrad_update``.
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
from lightning_ext.optim._step._checks import check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": first_moment, "exp_avg_sq": second_moment, "previous_grad": first_moment}
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")


@saves_moments(_STATES)
@checks_groups()
class DiffGrad(Optimizer):
    r"""Adam whose steps are held back, at most by half, where two gradients in a row are alike.

    .. math::
        \xi = \sigma(|g_{t-1} - g_t|), \qquad
        w \leftarrow w - \mathrm{lr}\, \xi\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    ξ lies in [½, 1) and sees how large gradients are, not only how they change: of gradients far
    below 1 it is about ½.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: False, an L2 penalty as published; True, AdamW's decay.
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
        >>> optimizer = DiffGrad([w], lr=0.1)
        >>> w.grad = torch.tensor([1e-4, 100.0])
        >>> optimizer.step()
        >>> w.data  # Adam's step is 0.1 for both
        tensor([0.9500, 0.9000])
    """

    batch_rule = "sde"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
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
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        check_groups(self)

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
                functional.diffgrad_update_,
                functional.diffgrad_update,
                rows(self, group, _STATES),
                {name: group[name] for name in _SETTINGS},
                group,
            )
        return loss
