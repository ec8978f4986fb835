"""AdamW whose moments take two bytes a parameter, one, or half a byte each.

Source: Loshchilov and Hutter 2019 (AdamW, arXiv:1711.05101); Dettmers et al. 2022
    (arXiv:2110.02861), "int8"; Li et al. 2023 (arXiv:2309.01507), "int4"; Xi et al. 2025 (COAT,
    arXiv:2410.19313), "fp8"; Zamirai et al. 2020 (arXiv:2010.06192), "bfloat16" and its weights.
Differs: see ``functional.encode_state``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional, kernels
from lightning_ext.optim._low_bit import _bitsandbytes
from lightning_ext.optim._low_bit._moments import (
    Backend,
    StateDtype,
    WeightRounding,
    first_moment,
    second_moment,
)
from lightning_ext.optim._low_bit._saved import saves_moments
from lightning_ext.optim._step._checks import check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import rows
from lightning_ext.optim._step._update import update

_STATES = {"exp_avg": first_moment, "exp_avg_sq": second_moment}
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")


_STEPS = {None: kernels.adamw_update_, "bitsandbytes": _bitsandbytes.adamw_update_}


@saves_moments(_STATES)
@checks_groups()
class LowBitAdamW(Optimizer):
    r"""AdamW that reads its moments as float32, updates them, and writes them in few bits.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        w \leftarrow (1 - \mathrm{lr}\,\lambda) w
            - \mathrm{lr}\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    The step is made of the moments before they are rounded. In checkpoints moments are tensors
    whose rows go with those of the parameter, whatever the number of ranks; a moment that was
    saved in another format, such as by ``torch.optim.AdamW``, is converted.

    Args:
        params: parameters or groups; a group may have its own ``state_dtype``.
        lr: rate, a number or a tensor of one entry.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ.
        state_dtype: format of both moments; ``None``, that of the parameter.
        min_quantized_numel: entries up to which a tensor's moments stay in float32, as those of
            vectors do.
        weight_rounding: of weights in bfloat16: at random, or with the error kept in an int8
            beside each ("compensated"), together 24 bits.
        seed: of what is rounded at random.
        backend: "bitsandbytes" for its step of "int8" states, which are the same.
        paged: whether states lie in pages that go between a GPU's memory and the host's;
            bitsandbytes' again.
        decoupled_weight_decay: False adds λw to g instead, which is Adam.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other, anything else all at once.
        fused: as in ``torch.optim``: ``None``, kernels on CUDA; ``True``, kernels or an error.

    Raises:
        ValueError: if a setting is out of range, or, at a step, rows are split over ranks.
        TypeError: if a parameter is complex, or "compensated" is asked for of another dtype.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(256, 256))
        >>> optimizer = LowBitAdamW([w], lr=0.1, state_dtype="int4")
        >>> w.grad = torch.ones(256, 256)
        >>> optimizer.step()
        >>> moments = [optimizer.state[w][name] for name in ("exp_avg", "exp_avg_sq")]
        >>> sum(map(functional.state_bytes, moments)) / w.numel()
        1.0625
    """

    batch_rule = "sde"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: StateDtype | None = "int8",
        min_quantized_numel: int = 4096,
        weight_rounding: WeightRounding = "nearest",
        seed: int = 0,
        backend: Backend = None,
        paged: bool = False,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
            "min_quantized_numel": min_quantized_numel,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "backend": backend,
            "paged": paged,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
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
                functional.adamw_update,
                rows(self, group, _STATES),
                {name: group[name] for name in _SETTINGS},
                group,
            )
        return loss
