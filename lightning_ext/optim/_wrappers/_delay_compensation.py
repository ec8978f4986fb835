"""DelayCompensation: for gradients of weights as they were some steps ago.

Source: Kosson et al. 2021 (Pipelined Backpropagation at Scale, arXiv:2003.11666): spike
    compensation, linear weight prediction in both forms, and the two together.
Differs: a delay and a horizon of each group; the weights' form goes with any optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_ext import functional
from lightning_ext.optim._batch._base_optimizer import base_optimizer
from lightning_ext.optim._lars import LARS
from lightning_ext.optim._step._checks import AT_LEAST_0, check_groups
from lightning_ext.optim._step._shards import local_part
from lightning_ext.optim._wrappers._wrapper import Wrapper

_RANGES = {"delay": AT_LEAST_0, "horizon": AT_LEAST_0}
_FORMS = ("velocity", "weights", None)
_FEW_STEPS = 3  # after which predictions that nobody asked for are not to come


class DelayCompensation(Wrapper):
    r"""Makes up for gradients that come D steps late, as in an asynchronous pipeline.

    .. math::
        w \leftarrow w - \mathrm{lr}\,(a v + b g), \quad a = m^D, \; b = \frac{1 - m^D}{1 - m}
        \qquad \text{spike compensation}

    .. math::
        \hat w = w - \mathrm{lr}\, T v \quad\text{or}\quad \hat w = w + T (w_t - w_{t-1})
        \qquad \text{the weights that forward and backward pass use}

    A group may have a ``delay`` and a ``horizon`` of its own, so that an early stage has a larger
    one. Without a delay it is the base to the bit.

    Args:
        base: the optimizer that steps. Spike compensation and the velocity's form need
            ``torch.optim.SGD`` or ``LARS`` with momentum, without dampening and Nesterov; the
            weights' form takes any.
        delay: D, steps between the weights that a gradient was made with and its use.
        spike: whether steps are compensated.
        prediction: form of the predicted weights, ``None`` for none. They are used where passes are
            made inside of ``predicted_weights()`` and nowhere else: Lightning's automatic
            optimization does not do that. Warns once if three steps were taken without.
        horizon: T; the delay by default.

    Raises:
        ValueError: if a setting is out of range, or the base does not have what it asks for.
        TypeError: if ``base`` is no optimizer, does not step along ``p.grad``, is or was in a
            DelayCompensation, or has complex parameters.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DelayCompensation(torch.optim.SGD([w], lr=0.5, momentum=0.5), delay=1)
        >>> w.grad = torch.tensor([1.0])
        >>> optimizer.step()
        >>> w.data  # 1 − lr(1/2 + 1)
        tensor([0.2500])
        >>> with optimizer.predicted_weights():
        ...     print(w.data)
        tensor([-0.2500])
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        delay: float,
        spike: bool = True,
        prediction: Literal["velocity", "weights"] | None = "velocity",
        horizon: float | None = None,
    ) -> None:
        if prediction not in _FORMS:
            raise ValueError(f"DelayCompensation got prediction={prediction!r}; choose of {_FORMS}")
        settings = {"delay": delay, "horizon": horizon, "spike": spike, "prediction": prediction}
        super().__init__(base, settings)
        # Changed in place: Lightning's optimizer calls methods with itself for self.
        self._kept: dict[Tensor, Tensor] = {}
        self._uses = {"predictions": 0, "steps": 0}

    def own_names(self) -> frozenset[str]:
        """The weights before the last step, for the weights' form."""
        return frozenset({"delay_previous"})

    @contextmanager
    def predicted_weights(self) -> Iterator[None]:
        """Have the predicted weights in the parameters: forward and backward pass go in here.

        Raises:
            RuntimeError: if they are there already.
        """
        self.predict()
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def predict(self) -> None:
        """Put the predicted weights into the parameters, until ``restore``.

        Raises:
            RuntimeError: if they are there already.
        """
        if self._kept:
            raise RuntimeError("The predicted weights are in the parameters already; restore first")
        predictions = self.predictions()
        self._kept.update((x, x.detach().clone()) for x in predictions)
        for param, ahead in predictions.items():
            local_part(param).copy_(ahead)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back that ``predict`` has replaced."""
        for param, weight in self._kept.items():
            param.copy_(weight)
        self._kept.clear()

    @torch.no_grad()
    def predictions(self) -> dict[Tensor, Tensor]:
        """Return the predicted weights, what this rank holds of them, and leave all as it is.

        Returns:
            By parameter; those that are predicted to stay are left out.
        """
        self._uses["predictions"] = 1
        found = {}
        for group in self.param_groups:
            horizon = _horizon(group)
            for param in group["params"] if horizon else ():
                velocity, lr = self._velocity(param, group)
                if velocity is not None:
                    found[param] = functional.predicted_weight(
                        local_part(param), velocity, lr=lr, horizon=horizon
                    )
        return found

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Remember what the step is computed from, and compensate it."""
        if self._kept:
            raise RuntimeError(
                "A step was taken with the predicted weights in the parameters. Hint: leave"
                " `with optimizer.predicted_weights():`, or call restore(), before step()"
            )
        before = {
            x: self._buffer(x, clone=True) for group in self._spiked() for x in group["params"]
        }
        self._remember()
        self._warn_if_unused()
        yield
        for group in self._spiked():
            self._compensate(group, before)

    def _remember(self) -> None:
        for group in self.param_groups:
            for param in group["params"] if group["prediction"] == "weights" else ():
                own = self.own.get(param)
                if own is not None:
                    own["delay_previous"].copy_(param)
                elif param.grad is not None:
                    self.own[param]["delay_previous"] = param.detach().clone()

    def _warn_if_unused(self) -> None:
        if self._uses["predictions"] or self._uses["steps"] >= _FEW_STEPS:
            return
        self._uses["steps"] += 1
        forms = {group["prediction"] for group in self.param_groups if _horizon(group)} - {None}
        if forms and self._uses["steps"] == _FEW_STEPS:
            warnings.warn(
                f"DelayCompensation took {_FEW_STEPS} steps with prediction={forms.pop()!r}, and"
                " nobody asked for the predicted weights: passes were made with the weights as they"
                " are. Hint: forward and backward pass inside of `with"
                " optimizer.predicted_weights():`, for which Lightning needs"
                " automatic_optimization = False; prediction=None where they are not wanted",
                stacklevel=2,
            )

    def _spiked(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["spike"] and group["delay"]]

    def _compensate(self, group: dict[str, Any], before: dict[Tensor, Tensor | None]) -> None:
        lr = 1.0 if group.get("lr_in_momentum") else group["lr"]
        for param in group["params"]:
            velocity = self._buffer(param)
            if param.grad is None or velocity is None:
                continue
            previous = before[param]
            correction = functional.spike_correction(
                velocity,
                torch.zeros_like(velocity) if previous is None else previous,
                momentum=group["momentum"],
                delay=group["delay"],
            )
            local_part(param).sub_(lr * correction)

    def _velocity(
        self, param: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | float]:
        """What a weight moves by in a step, and the rate to multiply it with."""
        if group["prediction"] == "weights" and param in self.own:
            previous = local_part(self.own[param]["delay_previous"])
            return previous - local_part(param.detach()), 1.0
        if group["prediction"] == "velocity":
            return self._buffer(param), 1.0 if group.get("lr_in_momentum") else group["lr"]
        return None, 1.0

    def _buffer(self, param: Tensor, *, clone: bool = False) -> Tensor | None:
        buffer = self.state.get(param, {}).get("momentum_buffer")
        local = None if buffer is None else local_part(buffer)
        return local.clone() if clone and local is not None else local

    def check_settings(self) -> None:
        """Refuse what is out of range, and bases that lack what a form needs."""
        check_groups(self, _RANGES)
        base = base_optimizer(self)
        for index, group in enumerate(self.param_groups):
            if not group["spike"] and group["prediction"] != "velocity":
                continue
            wrong = [f"{x}={group[x]}" for x in ("dampening", "nesterov") if group.get(x)]
            wrong += [] if group.get("momentum") else ["momentum=0"]
            if group.get("state_dtype") not in (None, "float32"):
                wrong.append(f"state_dtype={group['state_dtype']!r}")
            if not isinstance(base, (SGD, LARS)) or wrong:
                found = f" with {', '.join(wrong)}" if isinstance(base, (SGD, LARS)) else ""
                raise ValueError(
                    "DelayCompensation with spike=True or prediction='velocity' needs"
                    " torch.optim.SGD or LARS with momentum, without dampening and nesterov; group"
                    f" {index} is of {type(base).__name__}{found}. Hint: spike=False,"
                    " prediction='weights' goes with any optimizer"
                )


def _horizon(group: dict[str, Any]) -> float:
    """T of a group."""
    horizon: float = group["delay"] if group["horizon"] is None else group["horizon"]
    return horizon
