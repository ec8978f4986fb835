"""AdaGrad-Norm: one rate for all parameters, that falls as their gradients add up.

Source: Ward, Wu and Bottou 2019 (AdaGrad stepsizes, arXiv:1806.01811), Algorithm 1.
Differs: see ``functional.adagrad_norm_update``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ext import functional
from lightning_ext.optim._step._checks import AT_LEAST_0, check_groups, checks_groups
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._step._numbers import number_dtype, restore_numbers
from lightning_ext.optim._step._rows import Rows, rows
from lightning_ext.optim._step._sq_norm import sq_norm
from lightning_ext.optim._step._update import update

_RANGES = {"initial_accumulator": AT_LEAST_0}
_SETTINGS = ("lr", "eps", "weight_decay", "maximize")


@checks_groups(_RANGES)
class AdaGradNorm(Optimizer):
    r"""SGD whose rate is divided by the norm of all gradients so far.

    .. math::
        v \leftarrow v + \|g\|^2, \qquad
        x \leftarrow x - \mathrm{lr}\, \frac{g}{\sqrt v + \epsilon}

    v is one number, of all parameters, groups and shards. It is kept beside every parameter, and
    one that comes later takes the present value.

    Args:
        params: parameters or groups.
        lr: η, a number or a tensor of one entry.
        initial_accumulator: v before the first step, the paper's b₀²; at 0 the first step has the
            length lr, whatever the gradient is.
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: True shrinks weights by lr·λ; False adds λx to the gradient, and so
            to its norm.
        maximize: climb instead of descend.
        foreach: False updates one parameter after the other by the plain formula, anything else
            all at once.

    Raises:
        ValueError: if a setting is out of range.
        TypeError: if a parameter is complex.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = AdaGradNorm([x], lr=0.5)
        >>> x.grad = torch.tensor([3.0, -4.0])
        >>> optimizer.step()
        >>> x.data
        tensor([0.7000, 1.4000])
    """

    batch_rule = "none"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        initial_accumulator: float = 0.0,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "initial_accumulator": initial_accumulator,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)
        check_groups(self, _RANGES, shared=("initial_accumulator",))

    @property
    def accumulator(self) -> Tensor | None:
        """v, of no dimension; ``None`` before the first step."""
        return next((state["sq_sum"] for state in self.state.values() if "sq_sum" in state), None)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        loss = closure_loss(closure)
        states = {"sq_sum": self._start}
        found = [(rows(self, x, states, _RANGES), x) for x in self.param_groups]
        found = [(_penalized(x, group), group) for x, group in found if x.params]
        if not found:
            return loss
        grads = [x for part, _ in found for x in part.grads]
        whole = sq_norm(grads, [x for part, _ in found for x in part.whole])
        for part, group in found:
            settings = {name: group[name] for name in _SETTINGS} | {"sq_norm": whole}
            if not group["decoupled_weight_decay"]:
                settings |= {"weight_decay": 0.0}
            if _is_penalized(group):
                settings |= {"maximize": False}
            functions = functional.adagrad_norm_update_, functional.adagrad_norm_update
            update(*functions, part, settings, group, counted=False)
        self._share(found[0][0].states[0][0])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Args:
            state_dict: of an optimizer of the same groups.
        """
        super().load_state_dict(state_dict)
        restore_numbers(self, state_dict, "sq_sum")

    def _start(self, param: Tensor) -> Tensor:
        present = self.accumulator
        value = self.param_groups[0]["initial_accumulator"] if present is None else present
        dtype = number_dtype(param)
        return torch.zeros((), dtype=dtype, device=param.device) + value

    def _share(self, value: Tensor) -> None:
        """Give the present value to parameters that had no gradient this time."""
        idle = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        for param in idle:
            if param in self.state and "sq_sum" in self.state[param]:
                self.state[param]["sq_sum"].copy_(value)


def _is_penalized(group: dict[str, Any]) -> bool:
    return bool(group["weight_decay"]) and not group["decoupled_weight_decay"]


def _penalized(found: Rows, group: dict[str, Any]) -> Rows:
    """The rows with the gradients of the loss with its penalty, where it has one."""
    if not _is_penalized(group):
        return found
    how = {"weight_decay": group["weight_decay"], "maximize": group["maximize"]}
    return found._replace(grads=functional.l2_gradients(found.params, found.grads, **how))
