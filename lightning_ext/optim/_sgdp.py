"""SGDP: momentum SGD without the part of its steps that only makes scale-invariant weights longer.

Source: Heo et al. 2021 (AdamP, arXiv:2006.08217), Algorithm 1 and section 3.2.
Differs: see ``functional.sgdp_update``. λ is divided by 1 − μ, as in the authors' code, so that it
    is an L2 penalty's; rules for another batch leave it as they leave such a penalty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional
from lightning_ext.optim._low_bit._moments import StateDtype, first_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import AT_LEAST_0, UP_TO_1, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._shards import check_rows_whole, reduction
from lightning_ext.optim._step._update import update

_STATES = {"momentum_buffer": first_moment}
_RANGES = {"delta": AT_LEAST_0, "wd_ratio": UP_TO_1}
_SETTINGS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "delta",
    "wd_ratio",
    "nesterov",
    "maximize",
)


@saves_moments(_STATES)
@checks_groups(_RANGES)
class SGDP(Optimizer):
    r"""Momentum SGD whose steps are tangential where the loss does not depend on the weights' norm.

    .. math::
        b \leftarrow \mu b + (1 - \tau) g, \qquad
        w \leftarrow \left(1 - \frac{\mathrm{lr}\,\lambda\rho}{1 - \mu}\right) w
            - \mathrm{lr}\left(b - \frac{b \cdot w}{\|w\|^2}\, w\right)
            \quad\text{if } |\cos(g, w)| < \delta / \sqrt{\dim w}

    and otherwise the step without the projection, ρ = 1. The cosine is first that of every row of
    dimension 0 (output channel), then that of the whole; biases and other vectors are never
    projected. Under sharding rows must be whole on a rank, as FSDP2 has them; the cosine of the
    whole is that of all shards.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry; outside of the buffer, as in torch's SGD.
        momentum: μ in [0, 1).
        weight_decay: λ of an L2 penalty of about the same strength.
        dampening: τ, at the first step too.
        delta: δ; 0 projects nothing.
        wd_ratio: ρ where the step is projected, in [0, 1].
        nesterov: look ahead: take g + μb for b in the step.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.

    Raises:
        ValueError: if a setting is out of range, or, at a step, rows are split over ranks.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDP([w], lr=0.1)
        >>> w.grad = torch.tensor([[-4.0, 3.0]])
        >>> optimizer.step()
        >>> w.data
        tensor([[3.4000, 3.7000]])
    """

    batch_rule = "linear"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        dampening: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        state_dtype: StateDtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        # No decoupled_weight_decay: a rule would multiply λ by what 1/(1 − μ) does already.
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dampening": dampening,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        check_groups(self, _RANGES)
        self._projected: list[Tensor | None] = []

    @property
    def projected(self) -> list[Tensor | None]:
        """1 for what the last step was projected of, else 0: for each group (parameters,).

        Parameters without a gradient are left out. ``None`` for a group with ``foreach=False``.
        """
        return list(getattr(self, "_projected", []))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        loss = closure_loss(closure)
        self._projected = [self._update(group) for group in self.param_groups]
        return loss

    def _update(self, group: dict[str, Any]) -> Tensor | None:
        check_rows_whole("SGDP", group["params"])
        projected: Tensor | None = update(
            functional.sgdp_update_,
            functional.sgdp_update,
            rows(self, group, _STATES, _RANGES),
            {name: group[name] for name in _SETTINGS},
            group,
            reduce=reduction,
            counted=False,
        )
        return projected
