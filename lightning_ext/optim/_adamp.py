"""AdamP: Adam without the part of its steps that only makes scale-invariant weights longer.

Source: Heo et al. 2021 (AdamP, arXiv:2006.08217), Algorithm 2 and section 3.2.
Differs: see ``functional.adamp_update``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.optim._low_bit._moments import (
    StateDtype,
    WeightRounding,
    first_moment,
    second_moment,
)
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import AT_LEAST_0, UP_TO_1, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._shards import check_rows_whole, reduction
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": first_moment, "exp_avg_sq": second_moment}
_RANGES = {"delta": AT_LEAST_0, "wd_ratio": UP_TO_1}
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "delta", "wd_ratio", "nesterov", "maximize")


@saves_moments(_STATES)
@checks_groups(_RANGES)
class AdamP(Optimizer):
    r"""Adam whose steps are tangential where the loss does not depend on the weights' norm.

    .. math::
        p = \frac{\hat m}{\sqrt{\hat v} + \epsilon}, \qquad
        w \leftarrow (1 - \mathrm{lr}\,\lambda\rho)\, w
            - \mathrm{lr}\left(p - \frac{p \cdot w}{\|w\|^2}\, w\right)
            \quad\text{if } |\cos(g, w)| < \delta / \sqrt{\dim w}

    and AdamW's step otherwise, ρ = 1. The cosine is first that of every row of dimension 0 (output
    channel), then that of the whole; biases and other vectors are never projected. Under sharding
    rows must be whole on a rank, as FSDP2 has them; the cosine of the whole is that of all shards.

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        delta: δ; 0 projects nothing, which is AdamW.
        wd_ratio: ρ where the step is projected, in [0, 1].
        nesterov: look ahead.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
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
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamP([w], lr=0.1)
        >>> w.grad = torch.tensor([[-4.0, 3.0]])
        >>> optimizer.step()
        >>> w.data  # along the gradient, not along its signs
        tensor([[3.1120, 3.9160]])
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
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
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
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
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
        check_rows_whole("AdamP", group["params"])
        projected: Tensor | None = update(
            kernels.adamp_update_,
            functional.adamp_update,
            rows(self, group, _STATES, _RANGES),
            {name: group[name] for name in _SETTINGS},
            group,
            reduce=reduction,
        )
        return projected
