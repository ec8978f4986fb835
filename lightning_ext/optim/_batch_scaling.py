"""Hyper-parameters that follow the global batch, without a trace in the parameter groups.

Source: the rules of :func:`lightning_ext.scaling.scale_hyperparameters`.
Differs: the groups keep the values of the reference batch, so that schedulers, loggers and
    checkpoints go on seeing what the user set; the scaled values are there during ``step`` only.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.optim import (
    SGD,
    Adafactor,
    Adam,
    Adamax,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

from lightning_ext.scaling import (
    HYPERPARAMETER_RULES,
    Hyperparameters,
    momentum_buffer_scale,
    scale_hyperparameters,
    scale_step_count,
)

_ADAM_FAMILY = (Adam, Adamax, NAdam, RAdam, RMSprop, SparseAdam)
_DECOUPLED = (Adafactor, Muon)  # those that do not say so in their groups


def batch_rule(optimizer: Optimizer) -> str:
    """Names the rule by which an optimizer's hyper-parameters follow its batch.

    Args:
        optimizer: An optimizer; its class may name the rule in an attribute ``batch_rule``.

    Returns:
        The attribute, else ``"linear"`` for SGD and ``"sde"`` for the Adam family and RMSprop.

    Raises:
        ValueError: Nothing is known about this class.
    """
    named = getattr(type(optimizer), "batch_rule", None)
    if named is not None:
        return str(named)
    if isinstance(optimizer, SGD):
        return "linear"
    if isinstance(optimizer, _ADAM_FAMILY):
        return "sde"
    raise ValueError(
        f"There is no known batch rule for {type(optimizer).__name__}. Choose one of"
        f" {HYPERPARAMETER_RULES} as rule= (lr_rule= in AdaptiveBatchSize), or give the class an"
        " attribute `batch_rule`."
    )


class BatchScaling:
    r"""Runs every ``step`` of an optimizer with the hyper-parameters of :math:`\kappa` × the batch.

    Values in ``param_groups`` are those of the reference batch, before and after each step. When
    :math:`\kappa` changes under a rule that changes betas, the optimizer's step count is divided
    by the ratio, so that :math:`(\beta^\kappa)^{t/\kappa} = \beta^t` and the bias correction
    goes on unbroken; NAdam's ``momentum_decay``, which counts steps, is multiplied by
    :math:`\kappa`. Under ``"linear_samples"`` SGD's momentum buffer is scaled such that lr × buffer
    per sample does not jump. RAdam takes no adaptive step before its sixth, whatever the batch: a
    switch before about step :math:`5\kappa` makes it begin that again.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        rule: ``"auto"`` (see :func:`batch_rule`), ``"none"``, ``"linear"``, ``"linear_samples"``,
            ``"sqrt"`` or ``"sde"``.
        kappa: Global batch over reference batch that the optimizer's state belongs to.
        scale_weight_decay: Whether decoupled weight decay follows too. Coupled L2 never does.

    Attributes:
        last_lrs: The learning rate that the last step used, for each group.

    Raises:
        ValueError: The rule or the class of the optimizer is not known, a hyper-parameter that the
            rule needs is missing, or ``kappa`` is not a finite number above 0.

    Example:
        >>> import torch
        >>> from lightning_ext.optim import BatchScaling
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scaling = BatchScaling(optimizer)
        >>> scaling.set_kappa(4.0)
        >>> optimizer.param_groups[0]["lr"], scaling.lrs()
        (0.1, [0.4])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: str = "auto",
        *,
        kappa: float = 1.0,
        scale_weight_decay: bool = True,
    ) -> None:
        self.optimizer = optimizer
        self.rule = batch_rule(optimizer) if rule == "auto" else rule
        self.scale_weight_decay = scale_weight_decay
        self._check(kappa)
        self._kappa = float(kappa)
        self._reference: list[dict[str, Any]] | None = None
        self.last_lrs: list[float] | None = None
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def kappa(self) -> float:
        """Global batch over reference batch."""
        return self._kappa

    def set_kappa(self, kappa: float) -> None:
        """Changes the batch between two steps, and restates the optimizer's state for it.

        Raises:
            ValueError: ``kappa`` is not a finite number above 0; nothing has changed then.
        """
        self._check(kappa)
        previous, self._kappa = self._kappa, float(kappa)
        if self._kappa == previous:
            return
        if self._betas_follow():
            _divide_step_counts(self.optimizer, self._kappa / previous)
        for group in self.optimizer.param_groups:
            self._scale_momentum_buffers(group, previous)

    def lrs(self) -> list[float]:
        """The learning rate that the next step will use, for each group."""
        groups = self.optimizer.param_groups
        return [float(self._scaled(group, self._kappa)["lr"]) for group in groups]

    def detach(self) -> None:
        """Leaves the optimizer as it was found."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def _check(self, kappa: float) -> None:
        for group in self.optimizer.param_groups:
            self._scaled(group, kappa)  # raises now what a step would raise

    def _betas_follow(self) -> bool:
        return any(
            key in self._scaled(group, 2.0)
            for group in self.optimizer.param_groups
            for key in ("betas", "alpha")
        )

    def _scale_momentum_buffers(self, group: dict[str, Any], previous: float) -> None:
        """Keeps lr × buffer per sample where it is while the momentum changes."""
        if self.rule != "linear_samples":
            return
        old, new = (momentum_buffer_scale(group["momentum"], k) for k in (previous, self._kappa))
        for parameter in group["params"]:
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.mul_(new / old)

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._restore()  # a step that raised has left its values behind
        self.last_lrs = self.lrs()
        if self._kappa == 1.0:
            return None
        self._reference = []
        for group in self.optimizer.param_groups:
            scaled = self._scaled(group, self._kappa)
            self._reference.append({key: group[key] for key in scaled})
            group.update(scaled)
        return tuple(map(self._guarded, args)), {k: self._guarded(v) for k, v in kwargs.items()}

    def _guarded(self, argument: Any) -> Any:
        """A closure that leaves the reference values behind if it raises."""
        if not callable(argument):
            return argument

        def closure() -> Any:
            with ExitStack() as undo:
                undo.callback(self._restore)
                loss = argument()
                undo.pop_all()
            return loss

        return closure

    def _after_step(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._reference is not None:
            for group, values in zip(self.optimizer.param_groups, self._reference, strict=False):
                group.update(values)
        self._reference = None

    def _scaled(self, group: dict[str, Any], kappa: float) -> dict[str, Any]:
        """The entries of a group that depend on the batch, at ``kappa`` × the reference batch."""
        new, betas = self._hyperparameters(group, kappa), self._betas(group)
        values: dict[str, Any] = {"lr": group["lr"] * new.lr}
        if new.betas is not None and new.betas != betas:
            values |= {"betas": new.betas} if "betas" in group else {"alpha": new.betas[0]}
            if "momentum_decay" in group:  # per step of NAdam's schedule, whose unit grows
                values["momentum_decay"] = scale_step_count(group["momentum_decay"], 1 / kappa)
        for key in ("momentum", "eps", "weight_decay"):
            if getattr(new, key) is not None:
                values[key] = getattr(new, key)
        return values

    def _hyperparameters(self, group: dict[str, Any], kappa: float) -> Hyperparameters:
        decoupled = group.get("decoupled_weight_decay", isinstance(self.optimizer, _DECOUPLED))
        eps = group.get("eps")
        return scale_hyperparameters(
            kappa,
            rule=self.rule,
            lr=1.0,  # every rule is linear in lr, and a group's lr may be a tensor
            betas=self._betas(group),
            momentum=group.get("momentum") if isinstance(self.optimizer, SGD) else None,
            eps=None if isinstance(eps, tuple) else eps,  # Adafactor's are relative
            weight_decay=group["weight_decay"] if self.scale_weight_decay and decoupled else None,
        )

    def _betas(self, group: dict[str, Any]) -> tuple[float, ...] | None:
        if "betas" in group:
            return tuple(float(beta) for beta in group["betas"])
        # ASGD's alpha is an exponent.
        return (float(group["alpha"]),) if isinstance(self.optimizer, RMSprop) else None


def _divide_step_counts(optimizer: Optimizer, ratio: float) -> None:
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            step.copy_(scale_step_count(step, ratio))
        elif step is not None:
            state["step"] = scale_step_count(step, ratio)
