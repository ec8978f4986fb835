"""LAMB: Adam's steps, as long for each parameter as a share of its weights' norm.

Source: You et al. 2020 (LAMB, arXiv:1904.00962), Algorithm 2; NVIDIA's NVLAMB.
Differs: see ``functional.lamb_update``. What is called NVLAMB here is the paper's step of gradients
    that were clipped to a norm of 1 over all parameters first.
"""

from __future__ import annotations

from typing import Any, Literal

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
from lightning_ext.optim._step._checks import ABOVE_0, AT_LEAST_0, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._rows import Rows, rows
from lightning_ext.optim._step._shards import reduction
from lightning_ext.optim._step._sq_norm import sq_norm
from lightning_ext.optim._step._update import update
from lightning_ext.optim._step._vectors import warn_of_vectors

_STATES = {"exp_avg": first_moment, "exp_avg_sq": second_moment}
_RANGES = {"max_grad_norm": ABOVE_0, "trust_clip": ABOVE_0, "norm_range": AT_LEAST_0}


@saves_moments(_STATES)
@checks_groups(_RANGES)
class LAMB(Optimizer):
    r"""Adam with layer-wise rates, for large batches.

    .. math::
        u = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda x, \qquad
        x \leftarrow x - \mathrm{lr}\, \frac{\varphi(\|x\|)}{\|u\|}\, u

    Under sharding the norms are those of whole parameters.

    Args:
        params: parameters or groups; those of ``param_groups_for`` leave decay and trust ratio away
            where the paper does, at biases and the parameters of norm layers. A group may set
            ``trust_ratio=False``.
        lr: rate, a number or a tensor of one entry; the paper's grows as the root of the batch.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε.
        weight_decay: λ, inside of the ratio.
        form: ``"paper"``, or ``"nvlamb"``, which clips the gradients' norm over all parameters of
            the optimizer to 1 first.
        max_grad_norm: another norm to clip at; the form's own by default.
        norm_range: smallest and largest value of φ; φ(z) = z without it.
        trust_clip: the largest ratio.
        bias_correction: of both moments; the paper's last version leaves it to the warm-up.
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
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([{"params": [x], "trust_ratio": True}], lr=0.1, weight_decay=0.0)
        >>> x.grad = torch.tensor([0.1, 0.0])
        >>> optimizer.step()
        >>> x.data  # 0.1 · ‖x‖ along the sign of the gradient
        tensor([2.5000, 4.0000])
    """

    batch_rule = "sqrt"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        form: Literal["paper", "nvlamb"] = "paper",
        max_grad_norm: float | None = None,
        norm_range: tuple[float, float] | None = None,
        trust_clip: float | None = None,
        bias_correction: bool = True,
        state_dtype: StateDtype | None = None,
        weight_rounding: WeightRounding = "nearest",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if form not in ("paper", "nvlamb"):
            raise ValueError(f"LAMB got form={form!r}; choose 'paper' or 'nvlamb'")
        if max_grad_norm is None and form == "nvlamb":
            max_grad_norm = 1.0
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_ratio": True,
            "max_grad_norm": max_grad_norm,
            "norm_range": norm_range,
            "trust_clip": trust_clip,
            "bias_correction": bias_correction,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(warn_of_vectors("LAMB", params), defaults)
        check_groups(self, _RANGES, shared=("max_grad_norm",))
        for group in self.param_groups:
            _check_norm_range(group["norm_range"])
        self._ratios: list[Tensor | None] = []

    @property
    def trust_ratios(self) -> list[Tensor | None]:
        """Of the last step, a tensor for each group, shape (parameters with a gradient,).

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
        found = [(rows(self, group, _STATES, _RANGES), group) for group in self.param_groups]
        clip = self._clip([x for x, _ in found])
        self._ratios = [self._update(x, group, clip) for x, group in found]
        return loss

    def _clip(self, found: list[Rows]) -> Tensor | None:
        max_grad_norm = self.param_groups[0]["max_grad_norm"]
        if max_grad_norm is None:
            return None
        whole = [x for part in found for x in part.whole]
        grads = [x for part in found for x in part.grads]
        return functional.clip_coefficient(sq_norm(grads, whole), max_grad_norm)

    def _update(self, found: Rows, group: dict[str, Any], clip: Tensor | None) -> Tensor | None:
        names = ("lr", "betas", "eps", "weight_decay", "trust_ratio", "norm_range", "trust_clip")
        settings = {name: group[name] for name in (*names, "bias_correction", "maximize")}
        ratios: Tensor | None = update(
            kernels.lamb_update_,
            functional.lamb_update,
            found,
            settings | {"clip": clip},
            group,
            reduce=reduction,
        )
        return ratios


def _check_norm_range(norm_range: Any) -> None:
    if norm_range is None:
        return
    pair = isinstance(norm_range, (tuple, list)) and len(norm_range) == 2
    if pair and norm_range[0] <= norm_range[1]:
        return
    raise ValueError(f"LAMB got norm_range={norm_range}; give the smallest and the largest norm")
