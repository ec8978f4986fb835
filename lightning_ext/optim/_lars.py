"""LARS: momentum SGD with a rate of its own for each parameter.

Source: You et al. 2017 (LARS, arXiv:1708.03888), Algorithm 1; LARC of apex, the clipped form.
Differs: see ``functional.lars_update``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.optim._low_bit._moments import StateDtype, WeightRounding, first_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import ABOVE_0, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._shards import reduction
from lightning_ext.optim._step._update import update
from lightning_ext.optim._step._vectors import warn_of_vectors

_STATES = {"momentum_buffer": first_moment}
_RANGES = {"trust_coefficient": ABOVE_0}
_SETTINGS = (
    "lr",
    "momentum",
    "weight_decay",
    "trust_coefficient",
    "eps",
    "trust_ratio",
    "larc",
    "nesterov",
    "lr_in_momentum",
    "maximize",
)


@saves_moments(_STATES)
@checks_groups(_RANGES)
class LARS(Optimizer):
    r"""Momentum SGD with layer-wise rates, for large batches.

    .. math::
        \tau = \frac{\eta \|w\|}{\|g\| + \lambda \|w\| + \epsilon}, \qquad
        v \leftarrow \mu v + \tau (g + \lambda w), \qquad w \leftarrow w - \mathrm{lr}\, v

    Under sharding the norms are those of whole parameters.

    Args:
        params: parameters or groups; those of ``param_groups_for`` leave decay and trust ratio away
            at biases and the parameters of norm layers, as is common. A group may set
            ``trust_ratio=False``.
        lr: rate, a number or a tensor of one entry. It multiplies τ, so it is of the order of 1 to
            30 where η is 0.001.
        momentum: μ in [0, 1).
        weight_decay: λ.
        trust_coefficient: η.
        eps: ε.
        larc: take min(τ/lr, 1) for τ, so that no step is larger than that of SGD (LARC).
        nesterov: look ahead.
        lr_in_momentum: keep the rate inside of the momentum, as the paper does: after a change of
            the rate it goes on for some steps at the old one.
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
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LARS([w], lr=1.0, weight_decay=0.0, trust_coefficient=0.1)
        >>> w.grad = torch.tensor([[0.0, 100.0]])
        >>> optimizer.step()
        >>> w.data
        tensor([[3.0000, 3.5000]])
    """

    batch_rule = "linear"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        larc: bool = False,
        nesterov: bool = False,
        lr_in_momentum: bool = False,
        state_dtype: StateDtype | None = None,
        weight_rounding: WeightRounding = "nearest",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_ratio": True,
            "larc": larc,
            "nesterov": nesterov,
            "lr_in_momentum": lr_in_momentum,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(warn_of_vectors("LARS", params), defaults)
        check_groups(self, _RANGES)
        self._ratios: list[Tensor | None] = []

    @property
    def trust_ratios(self) -> list[Tensor | None]:
        """The τ of the last step, a tensor for each group, shape (parameters with a gradient,).

        ``None`` for a group with ``foreach=False``.
        """
        return list(getattr(self, "_ratios", []))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        loss = closure_loss(closure)
        self._ratios = [self._update(group) for group in self.param_groups]
        return loss

    def _update(self, group: dict[str, Any]) -> Tensor | None:
        ratios: Tensor | None = update(
            kernels.lars_update_,
            functional.lars_update,
            rows(self, group, _STATES, _RANGES),
            {name: group[name] for name in _SETTINGS},
            group,
            reduce=reduction,
            counted=False,
        )
        return ratios
