"""Lion: steps along the signs of an interpolated momentum.

Source: Chen et al. 2023 (Lion, arXiv:2302.06675), Algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.optim._low_bit import _bitsandbytes
from lightning_ext.optim._low_bit._moments import Backend, StateDtype, WeightRounding, first_moment
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": first_moment}


_STEPS = {None: kernels.lion_update_, "bitsandbytes": _bitsandbytes.lion_update_}


@saves_moments(_STATES)
@checks_groups()
class Lion(Optimizer):
    r"""Every entry moves by the rate, along the sign of β₁m + (1 − β₁)g.

    .. math::
        w \leftarrow (1 - \mathrm{lr}\,\lambda) w - \mathrm{lr}\,
            \mathrm{sign}(\beta_1 m + (1 - \beta_1) g), \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Args:
        params: parameters or groups.
        lr: rate, a number or a tensor of one entry; 3 to 10 times below AdamW's.
        betas: β₁ and β₂, each in [0, 1); the paper takes (0.95, 0.98) for language models where
            training is not stable.
        weight_decay: λ, decoupled; 3 to 10 times above AdamW's, so that lr·λ is the same.
        state_dtype: format of the moments; that of the parameter where ``None``. Vectors and
            tensors of at most 4096 entries stay in float32.
        weight_rounding: of weights in bfloat16: at random, or with the error kept in an int8
            beside each ("compensated").
        seed: of what is rounded at random.
        backend: "bitsandbytes" for its step of "int8" states, which are the same.
        paged: whether states lie in pages that go between a GPU's memory and the host's;
            bitsandbytes' again.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.
        fused: as in ``torch.optim``: ``None``, kernels on CUDA; ``True``, kernels or an error.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Lion([w], lr=0.25)
        >>> w.grad = torch.tensor([4.0, 0.0, -1.0])
        >>> optimizer.step()
        >>> w.data
        tensor([0.7500, 1.0000, 1.2500])
    """

    batch_rule = "sqrt"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_dtype: StateDtype | None = None,
        weight_rounding: WeightRounding = "nearest",
        seed: int = 0,
        backend: Backend = None,
        paged: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "backend": backend,
            "paged": paged,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "decoupled_weight_decay": True,
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
                _STEPS[group["backend"]],
                functional.lion_update,
                rows(self, group, _STATES),
                {name: group[name] for name in ("lr", "betas", "weight_decay", "maximize")},
                group,
                counted=False,
            )
        return loss
